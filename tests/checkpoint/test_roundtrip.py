"""What is loaded equals what was saved, bit for bit; what does not fit is refused by name."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.read import load_checkpoint
from moetrain.checkpoint.state_dict import model_tensors, optimizer_tensors
from moetrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def garbage_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Targets of the same shapes whose every byte is wrong to begin with."""
    return {
        name: (~t.detach().contiguous().reshape(-1).view(torch.uint8)).view(t.dtype).reshape(t.shape)
        if t.dtype != torch.bool
        else ~t
        for name, t in tensors.items()
    }


def odd_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    whole = torch.randn(11, 13, generator=g)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 5e-324, 1.7e308])
    tensors = {
        "fp64": torch.randn(3, 5, generator=g, dtype=torch.float64),
        "fp32": torch.randn(7, 2, 3, generator=g),
        "bf16": torch.randn(17, generator=g).bfloat16(),
        "fp16": torch.randn(5, generator=g).half(),
        "int64": torch.tensor([2**63 - 1, -(2**63), 0]),
        "int32": torch.arange(-3, 4, dtype=torch.int32),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([[True, False], [False, False]]),
        "scalar": torch.tensor(3.25),
        "step": torch.tensor(17, dtype=torch.int64),
        "empty": torch.empty(0),
        "empty2": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "view": whole[2:7, 3:9],
        "transposed": whole.t(),
        "expanded": torch.tensor([1.5]).expand(5),
        "special64": special.double(),
        "special32": special,
        'a name/with spaces, ünïcode and "quotes"': torch.ones(2),
    }
    payload = torch.tensor([0x7FF8000000000123, 0x7FF0000000000001], dtype=torch.int64)
    tensors["nan payload"] = payload.view(torch.float64)
    return tensors


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("hash", [False, True])
def test_odd_tensors_and_extra_come_back_exactly(tmp_path, async_save, hash):
    tensors = odd_tensors()
    extra = {"step": 7, "lr": 0.1 + 0.2, "big": 2**80, "tiny": 5e-324, "none": None, "list": [1, "ü"]}
    checkpointer = Checkpointer(tmp_path / "c", async_save=async_save, hash=hash)
    path = checkpointer.save(7, tensors, extra)
    checkpointer.wait()
    assert path == tmp_path / "c" / "step_00000007"
    assert checkpointer.latest_valid() == path
    found = garbage_like(tensors)
    assert Checkpointer(tmp_path / "c").load(path, found) == extra
    assert_same(found, tensors)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
            st.lists(st.integers(0, 5), max_size=4),
        ),
        max_size=5,
    ),
    st.integers(0, 2**31),
)
def test_any_shapes_and_dtypes_come_back_exactly(tmp_path_factory, shapes, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(-1000, 1000, shape, generator=g).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }
    checkpointer = Checkpointer(tmp_path_factory.mktemp("c"))
    found = garbage_like(tensors)
    checkpointer.load(checkpointer.save(1, tensors, {}), found)
    assert_same(found, tensors)


def tiny(seed: int = 0, width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    g = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(7, 3, generator=g)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("async_save", [False, True])
def test_training_goes_on_bit_for_bit(tmp_path, async_save):
    model, optimizer = tiny()
    train(model, optimizer, 5, seed=1)
    checkpointer = Checkpointer(tmp_path, async_save=async_save)
    path = checkpointer.save(5, model_tensors(model) | optimizer_tensors(model, optimizer), {})
    wanted = train(model, optimizer, 4, seed=2)  # while the save may still be under way
    checkpointer.close()
    other, other_optimizer = tiny(seed=9)
    checkpointer.load(path, model_tensors(other) | optimizer_tensors(other, other_optimizer))
    assert train(other, other_optimizer, 4, seed=2) == wanted
    assert_same(model_tensors(other), model_tensors(model))
    assert_same(optimizer_tensors(other, other_optimizer), optimizer_tensors(model, optimizer))


def test_nothing_on_disk_is_a_pickle_of_anything_but_tensors(tmp_path):
    path = Checkpointer(tmp_path).save(3, {"w": torch.ones(3)}, {"a": 1})
    assert sorted(p.name for p in path.iterdir()) == [
        "__0_0.distcp",
        "extra.json",
        "manifest.json",
        "metadata.json",
    ]


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_planted_pickles_are_never_run(tmp_path):
    """DCP would unpickle ``.metadata`` and byte entries; a payload in a tensor's place is refused."""
    from moetrain.checkpoint import format as f
    from moetrain.checkpoint import manifest as m

    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(3, {"w": torch.ones(3)}, {})
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    target = {"w": torch.zeros(3)}
    checkpointer.load(path, target)
    assert target["w"].tolist() == [1, 1, 1]

    data = path / "__0_0.distcp"
    torch.save(Evil(), data)
    metadata = path / f.METADATA
    text = metadata.read_text().replace(f'"length": {_length(metadata)}', f'"length": {data.stat().st_size}')
    metadata.write_text(text)
    names = (data.name, f.METADATA, f.EXTRA)
    records = [m.FileRecord(n, (path / n).stat().st_size, m.hash_file(path / n)) for n in names]
    (path / f.MANIFEST).write_bytes(m.encode_manifest(m.Manifest(3, tuple(records))))
    with pytest.raises(UserError, match=r"cannot be read: rank 0: .*its pickle asks for __builtin__ exec"):
        Checkpointer(tmp_path).load(path, {"w": torch.zeros(3)})


def _length(metadata) -> int:
    import json

    return json.loads(metadata.read_text())["tensors"]["w"]["chunks"][0]["length"]


def test_names_shapes_and_dtypes_must_agree(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    saved = {"a": torch.ones(3), "b": torch.ones(2, 5), "c": torch.ones(4), "e": torch.ones(())}
    path = checkpointer.save(1, saved, {})
    given = {
        "a": torch.zeros(3),
        "b": torch.zeros(5, 2),
        "c": torch.zeros(4, dtype=torch.float64),
        "d": torch.zeros(1),
    }
    with pytest.raises(UserError) as error:
        checkpointer.load(path, given)
    text = str(error.value)
    assert "\n" not in text
    assert f"checkpoint {path} is of another model or optimizer: 4 difference(s)" in text
    for part in (
        "d is not in the checkpoint",
        "e is in the checkpoint only",
        "b is float32[2, 5] in the checkpoint and float32[5, 2] here",
        "c is float32[4] in the checkpoint and float64[4] here",
    ):
        assert part in text
    assert given["a"].tolist() == [0, 0, 0]  # nothing was loaded


def test_at_most_ten_differences_are_listed(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, {f"x{i}": torch.ones(1) for i in range(17)}, {})
    with pytest.raises(
        UserError, match=r"17 difference\(s\): (x\d+ is in the checkpoint only; ){10}and 7 more$"
    ):
        checkpointer.load(path, {})


def test_a_meta_tensor_cannot_be_filled(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, {"w": torch.ones(3)}, {})
    with pytest.raises(UserError, match="w is on the meta device"):
        checkpointer.load(path, {"w": torch.empty(3, device="meta")})


def test_a_prefix_loads_the_model_alone(tmp_path):
    model, optimizer = tiny()
    train(model, optimizer, 2, seed=1)
    (tmp_path / "checkpoints").mkdir()
    Checkpointer(tmp_path / "checkpoints").save(
        2, model_tensors(model) | optimizer_tensors(model, optimizer), {"step": 2}
    )
    other, _ = tiny(seed=5)
    assert load_checkpoint(tmp_path, model_tensors(other), prefix="model.") == {"step": 2}
    assert_same(model_tensors(other), model_tensors(model))


def test_a_reader_leaves_a_save_under_way_alone(tmp_path):
    half = tmp_path / "checkpoints" / ".tmp_step_00000004"
    half.mkdir(parents=True)
    Checkpointer(tmp_path / "elsewhere").save(2, {"w": torch.ones(3)}, {})
    (tmp_path / "elsewhere" / "step_00000002").rename(tmp_path / "checkpoints" / "step_00000002")
    load_checkpoint(tmp_path, {"w": torch.zeros(3)})
    assert half.exists()


def test_what_cannot_be_saved_is_refused_before_writing(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    for bad in (torch.ones(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(TypeError, match="w: a checkpoint holds dense tensors"):
            checkpointer.save(1, {"w": bad}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, {"w": torch.ones(3)}, {"w": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_an_async_save_holds_the_values_of_its_moment(tmp_path):
    tensors = {"w": torch.arange(100_003, dtype=torch.float64), "step": torch.tensor(1.0)}
    wanted = {name: t.clone() for name, t in tensors.items()}
    checkpointer = Checkpointer(tmp_path, async_save=True)
    extra = {"position": [1, 2]}
    path = checkpointer.save(1, tensors, extra)
    for tensor in tensors.values():
        tensor.zero_()
    extra["position"].append(3)
    checkpointer.wait()
    assert checkpointer.load(path, tensors) == {"position": [1, 2]}
    assert_same(tensors, wanted)


def test_saving_and_loading_draw_no_random_numbers(tmp_path):
    model, optimizer = tiny()
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, model_tensors(model) | optimizer_tensors(model, optimizer), {})
    checkpointer.load(path, model_tensors(model), prefix="model.")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
