"""The codebook autoencoder, its losses and its training stage."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.render.layers import Attention2d, adain, group_norm
from flowvqtalker.render.perceptual import MobileNetV2Features, VGG19Features, find_weights
from flowvqtalker.render.vqvae import Codebook, CodebookConfig, VQAutoencoder
from flowvqtalker.train.gan import PatchDiscriminator, adversarial_loss, discriminator_loss

TINY = CodebookConfig(
    channels=(8, 8, 8, 8, 8, 16), decoder_channels=(8, 8, 8, 8, 8, 16), blocks=1, decoder_blocks=1, codes=32, dim=8,
    attention=False, full_resolution=False, upsample_kernel=1,
)  # fmt: skip


def test_nearest_code_is_the_brute_force_one() -> None:
    torch.manual_seed(0)
    book = Codebook(50, 6)
    z = torch.randn(2, 6, 4, 3)
    out = book(z)
    for b in range(2):
        for i in range(4):
            for j in range(3):
                distances = [(z[b, :, i, j] - code).norm() for code in book.weight]
                assert out.indices[b, i, j] == int(torch.stack(distances).argmin())
                assert torch.allclose(out.features[b, :, i, j], book.weight[out.indices[b, i, j]], atol=1e-6)


def test_gradient_passes_straight_through_the_quantiser() -> None:
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    Codebook(16, 4)(z).features.mul(torch.arange(16.0).view(1, 4, 2, 2)).sum().backward()
    assert torch.equal(z.grad, torch.arange(16.0).view(1, 4, 2, 2))


def test_each_quantiser_loss_moves_its_own_side() -> None:
    book = Codebook(16, 4)
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    out = book(z)
    out.code_loss.backward(retain_graph=True)
    assert z.grad is None and book.weight.grad.abs().sum() > 0
    book.weight.grad = None
    out.commitment_loss.backward()
    assert book.weight.grad is None and z.grad.abs().sum() > 0


def test_dead_codes_are_revived_at_latents() -> None:
    book = Codebook(64, 4)
    z = torch.randn(2, 4, 3, 3) + 5
    for _ in range(600):
        book(z)
    moved = book.revive(z, torch.Generator().manual_seed(0))
    assert moved > 0
    flat = z.movedim(1, -1).reshape(-1, 4)
    assert float(torch.cdist(book.weight.detach(), flat).min(1).values.median()) < 0.2
    assert book.revive(z, torch.Generator().manual_seed(0)) == 0


@pytest.mark.parametrize("name", ["lite", "paper"])
def test_512_pictures_become_16x16_codes(name: str) -> None:
    config = getattr(CodebookConfig, name)()
    assert (config.stride, config.dim, config.codes) == (32, 256, 1024)
    with torch.device("meta"):
        model = VQAutoencoder(config)
        assert model.encoder(torch.empty(1, 3, 512, 512)).shape == (1, 256, 16, 16)
        assert model.decoder(torch.empty(1, 256, 16, 16)).shape == (1, 3, 512, 512)


def test_lite_stays_within_its_budget() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = VQAutoencoder(CodebookConfig.lite())
        image, latent = torch.empty(1, 3, 512, 512), torch.empty(1, 256, 16, 16)
    for run, budget in ((lambda: model.encoder(image), 8e9), (lambda: model.decoder(latent), 18e9)):
        with FlopCounterMode(display=False) as counter:
            run()
        assert 0.3 * budget < counter.get_total_flops() <= budget


def test_decode_of_indices_is_the_reconstruction_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = VQAutoencoder(TINY)
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    out, quantized = model(image)
    assert out.shape == image.shape and quantized.indices.shape == (2, 2, 3)
    assert torch.allclose(out, model.decode(quantized.indices), atol=1e-5)
    (out.square().mean() + quantized.code_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 32"):
        VQAutoencoder(TINY)(torch.zeros(1, 3, 50, 64))
    with pytest.raises(ValueError, match="same length"):
        CodebookConfig(channels=(8, 8), decoder_channels=(8, 8, 8))


def test_adain_gives_the_statistics_of_the_style() -> None:
    content, style = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8) * 4 + 7
    out = adain(content, style)
    assert torch.allclose(out.mean((2, 3)), style.mean((2, 3)), atol=1e-4)
    assert torch.allclose(out.std((2, 3)), style.std((2, 3)), rtol=1e-3)


def test_cross_attention_reads_its_memory() -> None:
    torch.manual_seed(0)
    attention = Attention2d(16, heads=4)
    x, memory = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 5, 3)
    shuffled = memory.flatten(2)[..., torch.randperm(15)].view(1, 16, 5, 3)
    assert torch.allclose(attention(x, memory), attention(x, shuffled), atol=1e-5)
    assert not torch.allclose(attention(x, memory), attention(x, memory + torch.randn(1, 16, 5, 3)), atol=1e-3)
    assert group_norm(48).num_groups * 4 <= 48


def test_discriminator_losses() -> None:
    d = PatchDiscriminator(width=8, layers=2)
    logits = d(torch.randn(2, 3, 64, 64))
    assert logits.shape[:2] == (2, 1) and logits.shape[2] > 8
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    expected = -0.5 * (torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    assert discriminator_loss(real, fake, "log").item() == pytest.approx(expected.item(), rel=1e-5)
    assert adversarial_loss(fake).item() == pytest.approx(1.25)
    assert adversarial_loss(fake, "log").item() == pytest.approx(-torch.sigmoid(fake).log().mean().item(), rel=1e-5)


def test_perceptual_networks_have_torchvisions_layout() -> None:
    mobile = MobileNetV2Features().eval()
    assert "features.17.conv.2.weight" in mobile.state_dict() and "features.0.0.weight" in mobile.state_dict()
    assert [m.shape[1:] for m in mobile(torch.zeros(1, 3, 64, 64))] == [
        (16, 32, 32), (24, 16, 16), (32, 8, 8), (96, 4, 4), (320, 2, 2),
    ]  # fmt: skip
    vgg = VGG19Features().eval()
    assert [m.shape[1:] for m in vgg(torch.zeros(1, 3, 32, 32))] == [
        (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2),
    ]  # fmt: skip
    assert {0, 5, 10, 19, 28} <= {int(k.split(".")[1]) for k in vgg.state_dict()}


def test_wrong_perceptual_weights_are_named(tmp_path: Path) -> None:
    file = tmp_path / "vgg19.pth"
    file.write_bytes(b"something else")
    with pytest.raises(MissingDependency, match="sha256"):
        find_weights("vgg19", file)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):  # enough names that both splits get some
        image = cv2.resize(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), (128, 128), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"person{i}.png"), image)
    return folder


def test_codebook_stage_learns(pictures: Path, tmp_path: Path) -> None:
    from flowvqtalker.data.images import Augmentation
    from flowvqtalker.train.codebook import Config, Data, build
    from flowvqtalker.train.config import LoopConfig
    from flowvqtalker.train.loop import fit

    config = Config(
        data=Data(pictures, augmentation=Augmentation(crop=64, min_scale=0.5), validation=1),
        model=TINY,
        loop=LoopConfig(steps=36, batch_size=2, lr=3e-3, log_every=1, ema=0.5, threads=1, overfit=True),
        perceptual="none",
        adversarial_start=30,
        discriminator_width=4,
        revive_every=4,
    )
    stage = build(config)
    result = fit(stage, config.loop, tmp_path / "run")
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    column = rows[0].split(",").index("generator/l1")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    assert np.mean(losses[26:30]) < 0.9 * np.mean(losses[:4])
    assert 0 < result["codes_used"] <= 1 and result["psnr"] > 5
    assert (tmp_path / "run" / "weights.safetensors").is_file()


def test_training_items_depend_on_seed_and_number_alone(pictures: Path) -> None:
    from flowvqtalker.data.images import Augmentation, ImageDataset, find_images

    found = find_images(pictures)
    first, second = (
        ImageDataset(found, "train", Augmentation(crop=64, blur_jpeg=0.5), seed=1, size=128) for _ in range(2)
    )
    assert torch.equal(first[12345], second[12345]) and not torch.equal(first[1], first[2])
    assert first[0].shape == (3, 64, 64) and first[0].abs().max() <= 1
    people = {split: set(ImageDataset(found, split, Augmentation()).paths) for split in ("train", "val")}
    assert not people["train"] & people["val"]
    with pytest.raises(UserError, match="no images"):
        find_images(pictures / "nothing")
