"""Lists of features: read from files and runs, refused where they can't be meant, steered as is."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.steering.feature_lists import FeatureList, ListedFeature, read_list, typed_list
from crl_exp.steering.methods.listed import other_sae
from tests.helpers.tiny_run import ROOT, composed, run_small
from tests.steering.test_parity import COLUMNS

LISTS = ROOT / "assets" / "feature_lists" / "harmbench_lists.csv"


def csv(path, *lines: str, head: str = "layer,feature,coefficient"):
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return str(path)


def test_the_lists_of_the_logs():
    corrsteer, crl = (
        {one.layer: one for one in read_list(str(LISTS), name).features}
        for name in ("corrsteer", "crl")
    )
    assert sorted(corrsteer) == sorted(crl) == list(range(1, 26))
    assert corrsteer[7].feature == 11722
    same = [n for n in corrsteer if corrsteer[n].feature == crl[n].feature]
    assert len(same) == 18
    apart = [abs(corrsteer[n].coefficient / crl[n].coefficient - 1) for n in same]
    assert max(apart) < 0.08, "nearly the same coefficients"
    assert read_list(str(LISTS), "crl").sae["d_sae"] == 16384


@pytest.mark.parametrize(
    ("lines", "head", "said"),
    [
        ([], "layer,feature,coefficient", "is empty"),
        (["1,2,3.0", "1,2,4.0"], "layer,feature,coefficient", "layer 1, feature 2 is there 2"),
        (["1,2"], "layer,feature", "lacks the column coefficient"),
        (["1,2,3"], "layer,feature,coeficient", "did you mean 'coeficient'"),
        (["1,2,much"], "layer,feature,coefficient", "line 2: .*is not a layer, a feature"),
        (["1,2,inf"], "layer,feature,coefficient", "finite"),
        (["-1,2,3"], "layer,feature,coefficient", "count from 0"),
        (["1.5,2,3"], "layer,feature,coefficient", "is not a layer"),
        (["1,inf,3"], "layer,feature,coefficient", "line 2: .*'inf'.*is not a layer, a feature"),
        (["inf,2,3"], "layer,feature,coefficient", "line 2: .*is not a layer, a feature"),
        (["1,nan,3"], "layer,feature,coefficient", "line 2: .*is not a layer, a feature"),
    ],
)
def test_what_is_no_list_is_told(lines, head, said, tmp_path):
    path = csv(tmp_path / "mine.csv", *lines, head=head)
    try:
        found = "\n".join(read_list(path, None).faults())
    except UserError as error:
        found = str(error)
    assert re.search(said, found), found


@pytest.mark.parametrize("name", ["mine.csv", "mine.json", "features.json"])
def test_another_encoding_is_named_with_file_and_line(name, tmp_path):
    """A list, its card, and what a run steered by."""
    read = csv(tmp_path / "mine.csv", "1,2,3.0")
    if name == "features.json":
        read = str(tmp_path)
    text = (
        "layer,feature,coefficient\ncaf\u00e9,2,3\n" if name == "mine.csv" else '{\n"caf\u00e9": 1}'
    )
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    said = rf"^method.path: .*{name}, line 2, byte \d of the line: 0xE9 .*like cp1252 .*iconv"
    with pytest.raises(UserError, match=said):
        read_list(read, None)


def test_one_of_several_lists_is_chosen(tmp_path):
    several = csv(tmp_path / "two.csv", "a,1,2,3", "b,1,4,5", head="list,layer,feature,coefficient")
    assert read_list(several, "b").features == (ListedFeature(1, 4, 5.0),)
    with pytest.raises(UserError, match="holds the lists a, b; choose one"):
        read_list(several, None)
    with pytest.raises(UserError, match=r"which=c: .*no such list.*it has a, b"):
        read_list(several, "c")


def test_a_typed_list():
    assert typed_list([[1, 2, 3]]).features == (ListedFeature(1, 2, 3.0),)
    with pytest.raises(UserError, match=r"method\.features: .*is not a layer"):
        typed_list([[1, 2]])


@pytest.fixture(scope="module")
def common(tiny_files, tmp_path_factory) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path_factory.mktemp('listed')}"]


def refused(*overrides: str) -> str:
    exp = configs.experiment(composed(overrides))
    with pytest.raises(UserError) as caught:
        configs.validate(exp)
    return str(caught.value)


@pytest.mark.slow
def test_lists_that_can_not_be_steered_are_refused(common, tmp_path):
    listed = [*common, "method=listed", "layers=list"]
    said = refused(*listed, "layers.layers=[1]", "method.features=[[1,2,3],[2,2,3]]")
    assert "'layers.layers=[1,2]'" in said
    said = refused(*listed, "layers.layers=[1]", "method.features=[[1,9999,3]]")
    assert "layer 1, feature 9999: the SAE there has" in said
    assert "no SAE" in refused(*listed, "layers.layers=[3]", "method.features=[[3,1,3]]")
    said = refused(*listed, "layers.layers=[1]", f"method.path={LISTS}", "method.which=crl")
    assert (
        "layers.layers=[1,2,3" in said and "64 features, and the list is of one with 16384" in said
    )
    with pytest.raises(UserError, match="give either method"):
        configs.experiment(composed([*listed, "layers.layers=[1]"]))
    assert "no such file" in refused(*listed, "layers.layers=[1]", "method.path=nowhere.csv")
    assert "is empty" in refused(*listed, "layers.layers=[1]", "method.features=[]")


def test_a_list_of_random_directions_is_none_of_the_saes_features(common):
    """The numbers are the same, and what is added for them isn't."""
    corrsteer = [*common, "method=corrsteer_s", "layers.layer=1", "sae.dictionary=random"]
    folder = run_small(corrsteer)[1]
    listed = [*common, "method=listed", f"method.path={folder}", "layers.layer=1"]
    said = refused(*listed)
    assert "is of another SAE (sae.dictionary=random, not sae)" in said
    assert configs.validate(configs.experiment(composed([*listed, "sae.dictionary=random"])))


def test_a_list_of_a_release_is_for_a_copy_on_disk_too(common, tmp_path):
    """Where that is as wide; another release is refused, whatever its width."""
    path = csv(tmp_path / "mine.csv", "1,2,3.0")
    listed = [*common, "method=listed", f"method.path={path}", "layers.layer=1"]

    def card(**said) -> None:
        (tmp_path / "mine.json").write_text(json.dumps({"sae": {"release": "scope", **said}}))

    card(id_template="layer_{layer}", d_sae=64)
    assert configs.validate(configs.experiment(composed(listed))) == [1]
    card(d_sae=128)
    assert "64 features, and the list is of one with 128" in refused(*listed)
    other = FeatureList("mine", (), {"release": "scope"})
    exp = configs.experiment(composed([*listed, "sae.folder=null", "sae.release=wide"]))
    assert other_sae(other, exp)[0].startswith(
        "mine is of another SAE (sae.release=scope, not wide"
    )


def rows(folder) -> dict:
    table = pq.read_table(folder / "interventions.parquet", columns=COLUMNS).to_pydict()
    return {name: list(map(str, values)) for name, values in table.items()}


def test_listing_what_corrsteer_a_chose_equals_it_token_by_token(common, tmp_path):
    """From the run's folder, and typed out; without a stage 1."""
    corrsteer, folder = run_small([*common, "method=corrsteer_a", "layers=list"])
    again, replayed = run_small([*common, "method=listed", "layers=list", f"method.path={folder}"])
    said = json.loads((folder / "features.json").read_text())
    written = [
        f"{layer},{one['feature']},{one['coefficient']!r}"
        for layer, rows in said.items()
        for one in rows["chosen"]
    ]
    path = csv(tmp_path / "list.csv", *written)
    typed, from_csv = run_small([*common, "method=listed", "layers=list", f"method.path={path}"])
    assert rows(folder) == rows(replayed) == rows(from_csv)
    for key in ("accuracy_steered", "delta", "fixed", "broken", "unique_features"):
        assert corrsteer[key] == again[key] == typed[key]
    assert again["label"] == "listed features"
    listed = json.loads((replayed / "features.json").read_text())
    assert {n: one["chosen"] for n, one in listed.items()} == {
        n: one["chosen"] for n, one in said.items()
    }


def test_a_trained_run_is_listed_by_what_it_added_most(common, tmp_path):
    _, folder = run_small([*common, "method=crl", "layers.layer=1"])
    used = json.loads((folder / "features.json").read_text())["1"]["used"]
    (listed,) = read_list(str(folder), None).features
    assert listed.feature == max(used, key=lambda row: row["tokens"])["feature"]
