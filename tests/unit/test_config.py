import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from actors.errors import InputError
from pipeline.config import dump, load_run, schemas
from pipeline.suite import SuiteConfig

ROOT = Path(__file__).parents[2]
MINIMAL = {"suite": "s", "out": "o", "model": {"id": "m"}}


def write(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(file):
    assert load_run(file).model.id


def test_paths_resolve_against_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    file = write(tmp_path / "sub", MINIMAL | {"data": "../rows.jsonl", "out": "s3://bucket/x"})
    config = load_run(file)
    assert config.suite == str(tmp_path / "sub" / "s")
    assert config.data == str(tmp_path / "rows.jsonl")
    assert config.out == "s3://bucket/x"
    monkeypatch.chdir(tmp_path)
    assert load_run(file, ["data=here.jsonl"]).data == str(tmp_path / "here.jsonl")


def test_assignments_and_options_win_over_the_file(tmp_path):
    file = write(tmp_path, MINIMAL | {"limit": 5, "sampling": {"temperature": 0.5}})
    config = load_run(file, ["sampling.temperature=0.7", "agent.max_tokens.thought=9"], limit=3)
    assert (config.sampling.temperature, config.agent.max_tokens.thought, config.limit) == (0.7, 9, 3)


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_on_and_off_can_be_written_as_they_are(tmp_path, word):
    file = write(tmp_path, f"suite: s\nout: o\nmodel: {{id: m}}\nspeculation: {word}\n")
    config = load_run(file, [f"compile={word}"])
    assert (config.speculation, config.compile) == (word, word)
    for wrong in ("1", "[on]", "maybe"):
        with pytest.raises(InputError, match="compile: not valid"):
            load_run(file, [f"compile={wrong}"])


def test_merged_yaml_keys_may_be_set_again(tmp_path):
    text = "suite: s\nout: o\nmodel: {id: m}\npools: {a: {labels: &l {x: y}}}\nray: {labels: {<<: *l, x: z}}"
    assert load_run(write(tmp_path, text)).ray.labels == {"x": "z"}


def test_a_model_is_a_folder_beside_who_names_it(tmp_path, monkeypatch):
    for folder in ("yaml/smollm2-135m", "yaml/mine", "cwd/smollm2-135m", "cwd/mine", "cwd/org/name"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")

    def model_id(id: str, *sets: str) -> str:
        return load_run(write(tmp_path / "yaml", MINIMAL | {"model": {"id": id}}), sets).model.id

    assert model_id("smollm2-135m") == model_id("x", "model.id=smollm2-135m") == "smollm2-135m"
    assert model_id("mine") == str(tmp_path / "yaml" / "mine")
    assert model_id("x", "model.id=mine") == model_id("x", "model={id: mine}") == str(tmp_path / "cwd" / "mine")
    assert model_id("org/name") == "org/name"


def test_dump_keeps_no_secret(tmp_path):
    config = load_run(write(tmp_path, MINIMAL | {"out": "s3://KEY:never@host/x"}))
    assert dump(config)["out"] == "s3://(not recorded)@host/x"
    signed = "https://host/x?region=eu&X-Amz-Signature=never&sig=never&access_key=never"
    config = load_run(write(tmp_path, MINIMAL | {"out": signed, "data": "why?token=kept"}))
    assert dump(config)["out"] == (
        "https://host/x?region=eu&X-Amz-Signature=(not recorded)&sig=(not recorded)&access_key=(not recorded)"
    )
    assert dump(config)["data"].endswith("why?token=kept")
    args = {
        "api_key": "never",
        "Token": "never",
        "db_password": "never",
        "max_tokens": 3,
        "url": "http://u:never@h/a@b",
    }
    args["auth"] = [{"token": "never"}]
    suite = {"name": "s", "data": {"path": "d"}, "tools": ["calculator", {"use": "m:f", "args": args}]}
    dumped = dump(SuiteConfig.model_validate(suite))
    assert "never" not in json.dumps(dumped)
    assert dumped["tools"][1]["args"]["max_tokens"] == 3
    assert dumped["tools"][1]["args"]["url"] == "http://(not recorded)@h/a@b"


def test_dump_reads_back(tmp_path):
    config = load_run(write(tmp_path, MINIMAL))
    assert load_run(write(tmp_path, dump(config))) == config


def test_dump_keeps_names_of_variables_and_no_values(tmp_path):
    runtime_env = {"env_vars": {"TOKEN": "never-to-be-written-down"}, "pip": ["x"]}
    config = load_run(write(tmp_path, MINIMAL | {"ray": {"runtime_env": runtime_env}}))
    assert config.ray.runtime_env == runtime_env
    assert dump(config)["ray"]["runtime_env"] == {"env_vars": {"TOKEN": "(not recorded)"}, "pip": ["x"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limt": 3}, ["limt", "unknown field", "did you mean `limit`"]),
        ({"model": {"id": "m", "dtyp": "auto"}}, ["model.dtyp", "did you mean `dtype`"]),
        ({"agent": {"max_tokens": {"thougt": 1}}}, ["agent.max_tokens.thougt", "`thought`"]),
        ({"limit": -1}, ["limit", "-1", "greater than 0"]),
        ({"limit": "many"}, ["limit", "'many'", "valid integer"]),
        ({"model": {"id": "m", "dtype": "float8"}}, ["model.dtype", "'float8'", "bfloat16"]),
        ({"sampling": {"temperature": -0.1}}, ["sampling.temperature", "greater than or equal to 0"]),
        ({"engine": "pagde"}, ["engine", "did you mean `paged`"]),
        ({"fallback": ["smaller_bach"]}, ["fallback", "`smaller_batch`"]),
        ({"limits": {"max_usd": 3}}, ["price.usd_per_gpu_hour"]),
        ({"pools": {"single": {"replicas": 0}}}, ["pools.single.replicas"]),
        ({"pools": {}}, ["pools"]),
    ],
)
def test_a_wrong_field_is_named_with_what_it_wants(tmp_path, change, words):
    file = write(tmp_path, MINIMAL | change)
    with pytest.raises(InputError) as caught:
        load_run(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_all_problems_stand_in_one_message(tmp_path):
    with pytest.raises(InputError) as caught:
        load_run(write(tmp_path, {"suite": "s", "limt": 3, "samples": 0}))
    assert len(str(caught.value).splitlines()) == 4  # model and out missing, limt unknown, samples too small


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("suite: [", ["not YAML", "run.yaml:1"]),
        ("- a", ["not a mapping"]),
        ("", ["not a mapping"]),
        ("a: 1\n b: 2", ["not YAML"]),
        ("a: 1\nlimit: 2\nlimit: 3", ["run.yaml:3: not YAML: limit stands twice"]),
        ("a: {b: 1, c: {b: 2}, b: 3}", ["run.yaml:1: not YAML: b stands twice"]),
        ("a: 2024-13-45", ["run.yaml: not YAML: month must be in 1..12"]),
        ("a: " + "[" * 3000, ["run.yaml: not YAML: maximum recursion depth"]),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, words):
    with pytest.raises(InputError) as caught:
        load_run(write(tmp_path, content))
    assert all(word in str(caught.value) for word in words)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="not readable: Not a directory"):
        load_run(write(tmp_path, MINIMAL) / "suite.yaml")
    (tmp_path / "latin.yaml").write_bytes("suite: caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 at byte 11"):
        load_run(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "text", ["limit", "=3", "a..b=1", "suite.x=1", "model.id=[", "limit=2024-13-45", "model={id: a, id: b}"]
)
def test_a_wrong_assignment_is_refused(tmp_path, text):
    with pytest.raises(InputError, match="--set"):
        load_run(write(tmp_path, MINIMAL), [text])


def test_committed_schemas_are_current():
    for name, schema in schemas().items():
        committed = json.loads((ROOT / "schemas" / name).read_text(encoding="utf-8"))
        assert committed == schema, "run: python -m pipeline schemas"


def test_every_field_is_described():
    def walk(schema: dict) -> list[str]:
        parts = [schema, *schema.get("$defs", {}).values()]
        return [
            f
            for part in parts
            for f, v in part.get("properties", {}).items()
            if not ("description" in v or "$ref" in v)
        ]

    assert [name for schema in schemas().values() for name in walk(schema)] == []


def test_config_loads_no_torch():
    code = "import sys, pipeline.config, pipeline.suite; print('torch' in sys.modules or 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
