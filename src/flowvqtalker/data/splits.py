"""Splits by identity: nobody who is trained on is validated on; and the published splits of MEAD and HDTF."""

from __future__ import annotations

import hashlib

__all__ = ["HDTF_TEST", "MEAD_TEST", "hdtf_split", "mead_split", "split_of"]

#: Subjects of MEAD that EDTalk and EAT (and, with the same authors, FlowVQTalker) keep for testing.
MEAD_TEST = ("M003", "M030", "W009", "W015")

#: The 77 videos of HDTF in EDTalk's test list (tanshuai0219/EDTalk, data_preprocess/lists/test.json). It is a split by
#: video, so some speakers have another video in training: use :func:`split_of` to hold out people.
HDTF_TEST = frozenset(
    """
    RD_Radio11_001 RD_Radio1_000 RD_Radio27_000 RD_Radio28_000 RD_Radio33_000 RD_Radio34_001 RD_Radio34_002
    RD_Radio34_007 RD_Radio38_000 RD_Radio41_000 RD_Radio45_000 RD_Radio51_000 RD_Radio52_000 RD_Radio57_000
    RD_Radio7_000 WDA_AnnieKuster_000 WDA_BarackObama_001 WDA_BernieSanders_000 WDA_BobCasey1_000
    WDA_BrianSchatz1_000 WDA_ByronDorgan1_000 WDA_CatherineCortezMasto_000 WDA_ChrisVanHollen0_000
    WDA_DebbieStabenow0_000 WDA_DickDurbin_000 WDA_DonnaShalala1_000 WDA_DougJones_000 WDA_EdMarkey0_000
    WDA_EliotEngel_000 WDA_EmanuelCleaver_000 WDA_GerryConnolly_000 WDA_HaleyStevens_000 WDA_HillaryClinton_000
    WDA_JackReed1_000 WDA_JamesClyburn1_000 WDA_JeanneShaheen1_000 WDA_JoeNeguse_000 WDA_JoeNeguse_002
    WDA_JohnSarbanes0_000 WDA_LisaBluntRochester_000 WDA_MikeThompson1_000 WDA_NancyPelosi1_000 WDA_RichardNeal1_000
    WDA_TerriSewell0_000 WDA_TerriSewell_000 WDA_TomPerez_000 WDA_TomUdall_000 WDA_VeronicaEscobar0_000
    WDA_WhipJimClyburn_000 WDA_XavierBecerra_002 WDA_ZoeLofgren_000 WRA_CarlyFiorina0_000 WRA_CarlyFiorina_000
    WRA_CathyMcMorrisRodgers2_000 WRA_DanNewhouse_000 WRA_DaveCamp_000 WRA_DaveCamp_002 WRA_DavidVitter_000
    WRA_DianeBlack0_001 WRA_DianeBlack1_000 WRA_GeoffDavis_000 WRA_GeorgeLeMieux_000 WRA_GregWalden1_001
    WRA_JebHensarling1_001 WRA_JimRisch_000 WRA_JohnBarrasso0_000 WRA_JohnBoehner0_000 WRA_JohnBoozman_000
    WRA_JoniErnst0_000 WRA_KellyAyotte_000 WRA_KristiNoem0_000 WRA_KristiNoem2_001 WRA_MitchDaniels1_000
    WRA_PaulRyan1_001 WRA_PeterRoskam1_000 WRA_RogerWicker1_001 WRA_ShelleyMooreCapito1_001
    """.split()  # noqa: SIM905
)


def split_of(identity: str) -> str:
    """The split of everything that shows (or speaks with) one identity: ``"train"`` or ``"val"``, one in ten.

    A hash of the name decides, so the split needs no list, is the same on every machine, and does not change when
    identities are added.
    """
    return "val" if int(hashlib.sha1(identity.encode()).hexdigest(), 16) % 10 == 0 else "train"


def mead_split(subject: str) -> str:
    """The published split of a MEAD subject (``M003`` ... ``W040``): ``"train"`` or ``"test"``."""
    return "test" if subject in MEAD_TEST else "train"


def hdtf_split(video: str) -> str:
    """The published split of an HDTF video or of a piece of one (``RD_Radio1_000``, ``RD_Radio1_000#3``)."""
    return "test" if video.split("#")[0] in HDTF_TEST else "train"
