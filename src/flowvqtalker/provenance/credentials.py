"""C2PA content credentials: signed metadata which says that a program made the video (extra ``provenance``).

The specification is that of the Coalition for Content Provenance and Authenticity, https://spec.c2pa.org; signing
happens in this process and needs no network unless a time stamp is asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowvqtalker.errors import MissingDependency, UserError

__all__ = ["SIGNED_SUFFIXES", "Credential", "SigningError", "available", "load_credential", "read_credentials", "sign"]

#: Suffixes of the videos that can carry content credentials. Matroska cannot.
SIGNED_SUFFIXES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime"}
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_MODEL_CARD = "docs/model_card.md of the flowvqtalker source distribution"
_YEARS = 10
_INSTALL = "run `pip install 'flowvqtalker[provenance]'`"


class SigningError(Exception):
    """Content credentials could not be written."""


@dataclass(frozen=True)
class Credential:
    """What signs.

    Attributes:
        chain: certificates in PEM, the signer's first.
        key: private key on the curve P-256 (ES256).
    """

    chain: str
    key: Any


def available() -> bool:
    """Whether the packages of the extra ``provenance`` are installed."""
    try:
        import c2pa  # noqa: F401
        import cryptography  # noqa: F401
        import platformdirs  # noqa: F401
    except (ImportError, OSError):  # the native library may not fit the system
        return False
    return True


def load_credential(cert: str | Path | None = None, key: str | Path | None = None) -> Credential:
    """The user's certificate and key, or the local ones, which are made at first use.

    The local ones lie in ``signing.pem`` in the user's configuration folder, readable by the user alone. Where that
    folder cannot be written to, they serve this process only.

    Arguments:
        cert: PEM file of the certificate chain, the signer's first.
        key: PEM file of its private key, unencrypted, on the curve P-256.

    Raises:
        MissingDependency: if the extra ``provenance`` is not installed.
        UserError: if a file cannot be used, or only one is given.
    """
    if not available():
        raise MissingDependency(f"content credentials need the package c2pa-python; {_INSTALL}")
    if cert is not None and key is not None:
        return _parse(_read(cert), _read(key), f"{cert} and {key}")
    if cert is not None or key is not None:
        raise UserError("--sign-cert and --sign-key belong together; give both or neither")
    import platformdirs

    path = Path("signing.pem")
    try:
        path = Path(platformdirs.user_config_dir("flowvqtalker", appauthor=False)) / path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _store(path, _make())
        pem = path.read_bytes()
    except (OSError, RuntimeError):  # also for a user without a home folder
        pem = _make()
    return _parse(pem, pem, str(path))


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a PEM file") from error


def _parse(chain: bytes, key: bytes, name: str) -> Credential:
    """Check that key and certificate belong together."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        certificates = x509.load_pem_x509_certificates(chain)
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: no certificate or no unencrypted private key in PEM; give such files") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
        raise UserError(f"{name}: the private key must lie on the curve P-256 (ES256); make one with `openssl ecparam`")
    if certificates[0].public_key() != private.public_key():
        raise UserError(f"{name}: the first certificate does not belong to the private key; check the files")
    encoding = serialization.Encoding.PEM
    return Credential("".join(c.public_bytes(encoding).decode() for c in certificates), private)


def _store(path: Path, pem: bytes) -> None:
    """Write a file that appears whole; if another process was faster, its file stays."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def _make() -> bytes:
    """A new key with a certificate, PEM. A root signs it, since C2PA takes no self-signed one; its key is dropped."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return b"".join(
        (
            key.private_bytes(encoding, plain, serialization.NoEncryption()),
            _certificate("signer", key, root, authority=False).public_bytes(encoding),
            _certificate("root", root, root, authority=True).public_bytes(encoding),
        )
    )


def _certificate(name: str, key: Any, issuer: Any, *, authority: bool) -> Any:
    """X.509 as section "Certificate profile" of the C2PA specification asks."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(common: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "flowvqtalker (local key)")
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.timezone.utc)
    usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    usage |= dict.fromkeys(("encipher_only", "decipher_only"), False)
    usage |= {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named("root"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
    )
    if not authority:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer, hashes.SHA256())


def _context() -> Any:
    """Settings under which memory does not grow with the file: what exceeds a megabyte goes to a temporary file."""
    import c2pa

    return c2pa.Context(settings=c2pa.Settings.from_dict({"core": {"backing_store_memory_threshold_in_mb": 1}}))


def _signer(key: Any) -> Callable[[bytes], bytes]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    def callback(data: bytes) -> bytes:
        # COSE wants r and s side by side, not DER.
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return callback


def sign(path: Path, target: Path, credential: Credential, timestamp_url: str | None = None) -> None:
    """Add content credentials to a video in place, streaming.

    Arguments:
        path: the video, perhaps under a temporary name.
        target: its final name: title, kind (a key of :data:`SIGNED_SUFFIXES`), and the folder for a temporary file.
        credential: see :func:`load_credential`.
        timestamp_url: RFC 3161 time stamp authority; None writes no time stamp and needs no network.

    Raises:
        SigningError: if the video cannot be signed; it is as before.
        OSError: if the signed video cannot be written; it is damaged.
    """
    import c2pa

    from flowvqtalker import __version__

    agent = {"name": "flowvqtalker", "version": __version__}
    action = {"action": "c2pa.created", "digitalSourceType": _SOURCE, "softwareAgent": agent}
    manifest = {
        "claim_generator_info": [agent],
        "title": target.name.encode("utf-8", "replace").decode(),  # JSON has no undecodable bytes
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": "org.flowvqtalker.generator", "data": agent | {"model_card": _MODEL_CARD}},
        ],
    }
    with tempfile.TemporaryFile(dir=Path(os.path.realpath(target)).parent) as signed:
        try:
            with (
                c2pa.Signer.from_callback(
                    _signer(credential.key), c2pa.C2paSigningAlg.ES256, credential.chain, timestamp_url
                ) as signer,
                _context() as context,
                c2pa.Builder(manifest, context) as builder,
                open(path, "rb") as source,
            ):
                builder.sign(signer, SIGNED_SUFFIXES[target.suffix.lower()], source, signed)
        except (c2pa.C2paError, OSError) as error:
            raise SigningError(str(error)) from error
        signed.seek(0)
        with open(path, "r+b") as file:
            shutil.copyfileobj(signed, file, 1 << 20)
            file.truncate()


def read_credentials(path: str | Path) -> dict[str, Any] | None:
    """Content credentials of a file; None if there are none.

    Returns:
        ``state`` (``Valid``: unchanged since it was signed; ``Trusted``: by a signer on a trust list; ``Invalid``),
        ``generator``, ``issuer``, ``generated`` (whether an action states that a trained algorithm made the file).

    Raises:
        MissingDependency: if the extra ``provenance`` is not installed.
    """
    if not available():
        raise MissingDependency(f"content credentials were not looked for: {_INSTALL}")
    import c2pa

    try:
        with _context() as context, c2pa.Reader(str(path), context=context) as reader:
            store = json.loads(reader.json())
    except c2pa.C2paError:
        return None  # no manifest, or a kind of file that has none
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    actions = [
        action
        for assertion in manifest.get("assertions", [])
        if assertion.get("label", "").startswith("c2pa.actions")
        for action in assertion.get("data", {}).get("actions", [])
    ]
    generators = manifest.get("claim_generator_info") or [{}]
    return {
        "state": store.get("validation_state", "Invalid"),
        "generator": " ".join(str(generators[0].get(name, "")) for name in ("name", "version")).strip(),
        "issuer": manifest.get("signature_info", {}).get("issuer"),
        "generated": any(str(a.get("digitalSourceType", "")).endswith("rainedAlgorithmicMedia") for a in actions),
    }
