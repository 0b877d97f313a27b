"""Model ids, and every way in which one is not usable."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.engine import loader
from actors.engine.int8 import quantise, weights_dtype
from actors.errors import InputError, ModelUnavailable, UnsupportedModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=257,
        bos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=byte_level, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- folders


def test_folder(tiny):
    found = loader.resolve(str(tiny))
    assert (found.folder, found.source, len(found.revision)) == (tiny, "folder", 16)
    assert loader.resolve(str(tiny), found.revision) == found
    edit(tiny / "config.json", rope_theta=1.0)
    assert loader.resolve(str(tiny)).revision != found.revision
    with pytest.raises(ModelUnavailable, match="hash to"):
        loader.resolve(str(tiny), found.revision)


def test_config_tokenizer_model(tiny):
    assert loader.load_config(tiny).num_hidden_layers == 1
    tokenizer = loader.load_tokenizer(tiny)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 257
    assert tokenizer.decode(tokenizer("a ü\n 你").input_ids) == "a ü\n 你"
    model = loader.load_model(tiny)
    assert model.dtype == torch.float32
    assert not model.training
    assert loader.load_model(tiny, "bfloat16").dtype == torch.bfloat16


def test_stop_tokens_are_all_eos(tiny):
    assert loader.stop_token_ids(tiny) == {257}
    edit(tiny / "generation_config.json", eos_token_id=[3, 4])
    assert loader.stop_token_ids(tiny) == {3, 4, 257}
    (tiny / "generation_config.json").unlink()
    edit(tiny / "config.json", eos_token_id=[9])
    assert loader.stop_token_ids(tiny) == {9, 257}
    tokenizer = loader.load_tokenizer(tiny)
    assert loader.stop_token_ids(tokenizer) == {257}
    assert loader.stop_token_ids(tokenizer, loader.load_model(tiny).generation_config) == {9, 257}


def test_resolve_loads_no_torch(tiny):
    code = (
        f"import sys; from actors.engine.loader import resolve; resolve({str(tiny)!r}); print('torch' in sys.modules)"
    )
    root = Path(loader.__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "False"


def test_folder_without_config(tmp_path, tiny):
    with pytest.raises(ModelUnavailable, match=r"there is no config\.json$"):
        loader.resolve(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelUnavailable, match=r"name the \.gguf file itself"):
        loader.resolve(str(tmp_path))
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match=r"LoRA adapter: put it under model\.adapter"):
        loader.resolve(str(tmp_path))


def test_folder_without_weights(tiny):
    (tiny / "model.safetensors").unlink()
    (tiny / "training_args.bin").touch()
    with pytest.raises(ModelUnavailable, match="no weights"):
        loader.resolve(str(tiny))
    with pytest.raises(ModelUnavailable, match="no weights"):
        loader.load_model(tiny)
    assert loader.resolve(str(tiny), weights=False).folder == tiny


@pytest.mark.parametrize("id_", ["/no/such/folder", "./none", "~/none-at-all", "a/b/c", "none.gguf", "org/none.gguf"])
def test_no_such_path(id_):
    with pytest.raises(ModelUnavailable, match="no such file or folder"):
        loader.resolve(id_)


def test_a_file_of_another_kind(tiny):
    with pytest.raises(ModelUnavailable, match=r"no \.gguf"):
        loader.resolve(str(tiny / "config.json"))


# --- weights, configs and tokenizers that do not load


def test_truncated_weights(tiny):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match="weights cannot be loaded"):
        loader.load_model(tiny)


def test_weights_that_do_not_fit_are_refused_rather_than_made_up(tiny):
    edit(tiny / "config.json", num_hidden_layers=2)
    with pytest.raises(ModelUnavailable, match=r"missing keys, first model\.layers\.1"):
        loader.load_model(tiny)


def test_weights_of_another_shape(tiny):
    edit(tiny / "config.json", intermediate_size=48)
    with pytest.raises(ModelUnavailable, match="weights"):
        loader.load_model(tiny)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_not_unpickled(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = LlamaForCausalLM.from_pretrained(tiny).state_dict()
    (tiny / "model.safetensors").unlink()
    torch.save(state, tiny / "pytorch_model.bin")
    loader.load_model(tiny)
    torch.save({**state, "bomb": Bomb()}, tiny / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match="weights cannot be loaded"):
        loader.load_model(tiny)
    assert not Path("exploded").exists()


def test_unknown_architecture(tiny):
    edit(tiny / "config.json", model_type="warp_drive")
    with pytest.raises(UnsupportedModel, match="warp_drive"):
        loader.load_config(tiny)
    with pytest.raises(UnsupportedModel, match="warp_drive"):
        loader.load_model(tiny)


def test_not_a_causal_model(tiny):
    (tiny / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModel, match="not a causal language model"):
        loader.load_model(tiny)


def test_code_of_the_repository_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit(tiny / "config.json", model_type="warp_drive", auto_map={"AutoConfig": "code.Config"})
    (tiny / "code.py").write_text("open('exploded', 'w')\n")
    with pytest.raises(ModelUnavailable, match=r"trust_remote_code: warp_drive runs Python code"):
        loader.load_model(tiny)
    assert not Path("exploded").exists()


def test_broken_config(tiny):
    (tiny / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="JSON"):
        loader.load_config(tiny)


def test_no_tokenizer(tiny):
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnavailable, match="tokenizer"):
        loader.load_tokenizer(tiny)
    assert loader.stop_token_ids(tiny) == {257}


def test_dtype_and_quantization(tiny, monkeypatch):
    with pytest.raises(InputError, match=r"model\.dtype.*int4"):
        loader.load_model(tiny, "int4")
    with pytest.raises(InputError, match=r"model\.quantization.*int4"):
        loader.load_model(tiny, quantization="int4")
    for capability, dtype in [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert loader.resolve_dtype("auto", "cuda:0") == dtype
    assert loader.resolve_dtype("auto", "cpu") == torch.float32


# --- adapters


PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@PEFT_IS_BEHIND
def test_adapter_is_merged(tiny, adapter):
    weight = "model.layers.0.self_attn.q_proj.weight"
    base, merged = loader.load_model(tiny).state_dict(), loader.load_model(tiny, adapter=str(adapter)).state_dict()
    assert base.keys() == merged.keys()
    assert not torch.equal(base[weight], merged[weight])
    assert torch.equal(base["lm_head.weight"], merged["lm_head.weight"])


@PEFT_IS_BEHIND
def test_an_adapter_is_merged_before_weights_are_quantised(tiny, adapter):
    found = loader.load_model(tiny, adapter=str(adapter), quantization="int8")
    wanted = loader.load_model(tiny, adapter=str(adapter))
    quantise(wanted, "cpu")
    wanted_state = wanted.state_dict()
    assert all(torch.equal(value, wanted_state[name]) for name, value in found.state_dict().items())
    assert weights_dtype(found) == "int8"


@PEFT_IS_BEHIND
def test_a_pinned_adapter_must_hold(tiny, adapter):
    pinned, revision = loader.pinned_adapter(str(adapter))
    assert loader.pinned_adapter(pinned) == (pinned, revision)
    loader.load_model(tiny, adapter=pinned)
    edit(adapter / "adapter_config.json", lora_alpha=3)
    with pytest.raises(ModelUnavailable, match=f"{revision}"):
        loader.load_model(tiny, adapter=pinned)


@PEFT_IS_BEHIND
def test_adapter_errors(tiny, adapter, monkeypatch):
    with pytest.raises(ModelUnavailable, match=r"adapter_config\.json"):
        loader.load_model(tiny, adapter=str(tiny))
    edit(adapter / "adapter_config.json", target_modules=["none"])
    with pytest.raises(ModelUnavailable, match="does not fit the model"):
        loader.load_model(tiny, adapter=str(adapter))
    edit(adapter / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ModelUnavailable, match="missing adapter keys"):
        loader.load_model(tiny, adapter=str(adapter))
    edit(adapter / "adapter_config.json", peft_type="PREFIX_TUNING")
    with pytest.raises(UnsupportedModel, match="PREFIX_TUNING"):
        loader.load_model(tiny, adapter=str(adapter))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"berth\[lora\]"):
        loader.load_model(tiny, adapter=str(adapter))


# --- the hub


def http(kind: type[hub.HfHubHTTPError], status: int) -> Exception:
    return kind("simulated", response=httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co")))


@pytest.fixture
def snapshot(monkeypatch):
    """Replaces the download: `snapshot(error)` raises, `snapshot(function)` answers."""

    def install(answer):
        def download(id, **kwargs):
            if isinstance(answer, Exception):
                raise answer
            return str(answer(id, **kwargs))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return install


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: http(hub.GatedRepoError, 403), "gated: ask for access.*HF_TOKEN"),
        (lambda: http(hub.RepositoryNotFoundError, 404), "no repository org/name.*private"),
        (lambda: http(hub.DisabledRepoError, 403), "disabled"),
        (lambda: http(hub.RevisionNotFoundError, 404), r"model\.revision: org/name has no such revision.*'v9'"),
        (lambda: hub.LocalEntryNotFoundError("not cached"), "hub cannot be reached; download it first"),
        (lambda: hub.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (lambda: http(hub.HfHubHTTPError, 500), "cannot be downloaded: HfHubHTTPError: simulated"),
        (lambda: httpx2.ProxyError("no proxy"), "cannot be downloaded: ProxyError: no proxy"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "no disk space left.*HF_HOME"),
        (lambda: RuntimeError("Data processing error: No space left on device"), "no disk space"),
    ],
)
def test_hub_errors(snapshot, error, message):
    snapshot(error())
    with pytest.raises(ModelUnavailable, match=message):
        loader.resolve("org/name", "v9")


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="org/name is not complete in this node's cache and HF_HUB_OFFLINE"):
        loader.resolve("org/name", cache=tmp_path)


def test_a_name_the_hub_does_not_allow(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"not the name of a repository.*wants org/name"):
        loader.resolve("no spaces please", cache=tmp_path)


def test_a_name_is_no_folder_of_the_current_one(snapshot, saved, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    snapshot(http(hub.RepositoryNotFoundError, 404))
    with pytest.raises(ModelUnavailable, match="no repository org/name"):
        loader.resolve("org/name")
    with pytest.raises(ModelUnavailable, match="no repository org/name"):
        loader.resolve_adapter("org/name")
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        loader.resolve("./org/name")


def test_hub_snapshot(snapshot, saved, tmp_path):
    asked = []
    folder = tmp_path / "snapshots" / COMMIT

    def download(id, *, revision, cache_dir, allow_patterns):
        asked.append((id, revision, "model*.safetensors" in allow_patterns, "pytorch_model*.bin" in allow_patterns))
        return folder

    snapshot(download)
    shutil.copytree(saved, folder)
    assert loader.resolve("org/name", "main") == loader.ResolvedModel(folder, COMMIT, "hub")
    assert asked == [("org/name", "main", True, False)]
    (folder / "model.safetensors").unlink()
    loader.resolve("org/name", weights=False)
    with pytest.raises(ModelUnavailable, match=r"org/name@0123456789ab: there is a config\.json but no weights"):
        loader.resolve("org/name")
    # without safetensors it asks for the same commit's .bin
    assert asked[1:] == [
        ("org/name", None, False, False),
        ("org/name", None, True, False),
        ("org/name", COMMIT, False, True),
    ]
    (folder / "config.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"org/name@0123456789ab: there is no config\.json"):
        loader.resolve("org/name", weights=False)


def test_cached_commit_is_found_offline(monkeypatch, saved, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert loader.resolve("org/name", cache=tmp_path).revision == COMMIT


# --- GGUF


@pytest.fixture
def fake_gguf(tmp_path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(2000))
    return path


def test_gguf_that_is_none(tmp_path, fake_gguf):
    fake_gguf.write_bytes(b"<!doctype html>")
    with pytest.raises(ModelUnavailable, match="not a GGUF file"):
        loader.resolve(str(fake_gguf), cache=tmp_path)


def test_corrupt_gguf_leaves_nothing(tmp_path, fake_gguf):
    with pytest.raises(ModelUnavailable, match=r"model\.gguf: cannot be converted"):
        loader.resolve(str(fake_gguf), cache=tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_truncated_gguf(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(loader._bundled_gguf().read_bytes()[: 3 << 20])
    with pytest.raises(ModelUnavailable, match="cannot be converted"):
        loader.resolve(str(path), cache=tmp_path / "cache")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device")])
def test_no_disk_space(tmp_path, fake_gguf, monkeypatch, error):
    def convert(path, folder):
        (folder / "config.json").touch()
        raise error

    monkeypatch.setattr(loader, "_convert_gguf", convert)
    with pytest.raises(ModelUnavailable, match=r"no disk space left.*BERTH_CACHE"):
        loader.resolve(str(fake_gguf), cache=tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_conversion_replaces_what_a_killed_process_left(tmp_path, fake_gguf, monkeypatch):
    monkeypatch.setattr(loader, "_convert_gguf", lambda path, folder: (folder / "config.json").touch())
    monkeypatch.setenv("BERTH_CACHE", str(tmp_path / "cache"))
    found = loader.resolve(str(fake_gguf))
    assert found.folder.parent == tmp_path / "cache" / "gguf"
    found.folder.rename(found.folder.with_name(f".{found.folder.name}.left"))
    assert loader.resolve(str(fake_gguf), found.revision) == found
    assert sorted(p.name for p in found.folder.parent.iterdir()) == [found.folder.name, f"{found.folder.name}.lock"]
    with pytest.raises(ModelUnavailable, match="hash to"):
        loader.resolve(str(fake_gguf), "0" * 16)


CONVERT_AND_LOG = """
import sys, time
from actors.engine import loader
from actors.engine.int8 import quantise, weights_dtype

def convert(path, folder):
    with open(sys.argv[2] + "/log", "a") as f:
        f.write("converted\\n")
    time.sleep(1)
    (folder / "config.json").touch()

loader._convert_gguf = convert
assert (loader.resolve(sys.argv[1], cache=sys.argv[2]).folder / "config.json").is_file()
"""


def test_processes_of_a_node_convert_once(tmp_path, fake_gguf):
    command = [sys.executable, "-c", CONVERT_AND_LOG, str(fake_gguf), str(tmp_path)]
    children = [subprocess.Popen(command, cwd=Path(loader.__file__).parents[2]) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"


def test_smollm2_tokenizer(smollm2):
    tokenizer = loader.load_tokenizer(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert loader.stop_token_ids(smollm2) == {tokenizer.convert_tokens_to_ids("<|im_end|>")} == {2}
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for sample in [text, " leading", "trailing  ", "Thought 1: 12,345.6\n\n7 don't", "ünï 你好 🙂", "\t\r\n"]:
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    # SmolLM2 splits digits off before anything else: the blank lines stay one token
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n42").input_ids) == ["a", "ĊĊ", "4", "2"]
    assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id


def test_smollm2_answers(smollm2):
    tokenizer, model = loader.load_tokenizer(smollm2), loader.load_model(smollm2)
    assert (model.dtype, loader.load_config(smollm2).num_key_value_heads) == (torch.float32, 3)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
