"""How ranks divide samples, and the objective in a model whose weights two ranks shard (FSDP2)."""

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.core import AdaptiveOpener, Head, TeacherHidden, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.models import distributed as distributed_models
from tsdkd.stages.models.load import load_model
from tsdkd.stages.train import batch_order
from tsdkd.stages.train.batch_order import DistributedOpener, MicroBatches
from tsdkd.stages.train.trainer import DistillationTrainer


@pytest.mark.parametrize("samples", [1, 7, 8, 11])
@pytest.mark.parametrize(("processes", "size"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_ranks_divide_the_batches_of_one_process(samples: int, processes: int, size: int) -> None:
    alone = MicroBatches(samples, 4, seed=3, rank=0, world_size=1)
    samplers = [MicroBatches(samples, size, seed=3, rank=rank, world_size=processes) for rank in range(processes)]
    for epoch in (0, 1):
        for sampler in (alone, *samplers):
            sampler.set_epoch(epoch)
        steps = list(zip(*samplers, strict=True))  # equally many micro-batches on each rank
        assert len(steps) == len(samplers[0])
        together = [index for step in steps for batch in step for index in batch]
        assert together == [index for batch in alone for index in batch]
        assert sorted(together) == list(range(samples))
    first, second = (list(_in_epoch(alone, epoch)) for epoch in (0, 1))
    assert samples == 1 or first != second


def _in_epoch(sampler: MicroBatches, epoch: int) -> MicroBatches:
    sampler.set_epoch(epoch)
    return sampler


def test_openers_follow_the_samples_of_all_ranks_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of two samples each, one at the end on the second rank, get the openers of one process."""
    uncertainties = [[0.1, 0.9], [0.4, 0.6]], [[0.95, 0.2], [0.3]]
    alone = AdaptiveOpener()
    expected = [alone.update([*first, *second]) for first, second in uncertainties]
    for rank in (0, 1):
        opener = DistributedOpener()
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        for both, whole in zip(uncertainties, expected, strict=True):
            monkeypatch.setattr(batch_order, "gather_object", lambda own, both=both: both)
            assert opener.update(both[rank]) == (whole[:2] if rank == 0 else whole[2:])
        assert opener.state_dict() == alone.state_dict()


@pytest.mark.parametrize(
    ("distributed", "version", "good"),
    [("MULTI_GPU", None, True), ("FSDP", 2, True), ("FSDP", 1, False), ("DEEPSPEED", None, False)],
)
def test_other_strategies_are_refused(distributed: str, version: int | None, good: bool) -> None:
    plugin = version and SimpleNamespace(fsdp_version=version)
    with nullcontext() if good else pytest.raises(InputError, match="not supported"):
        distributed_models.require_supported_strategy(DistributedType[distributed], plugin)


def inputs(vocab: int) -> dict[str, object]:
    """Four responses of five tokens after three of prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (4, 8), generator=generator)
    hidden, weight = torch.randn(20, 6, generator=generator), torch.randn(vocab, 6, generator=generator)
    mask = torch.ones(4, 5, dtype=torch.bool)
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    predicting[:, 2:-1] = True
    return {"ids": ids, "predicting": predicting, "mask": mask, "hidden": hidden, "weight": weight}


def gradients(path: Path, rank: int | None, mixed: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of all four responses; or, on one of two ranks, of two responses over sharded weights."""
    model = AutoModelForCausalLM.from_pretrained(path)
    vocab = model.config.vocab_size
    x = inputs(vocab)
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    source = SimpleNamespace(teacher_fraction=0.0)
    trainer = SimpleNamespace(vocab=vocab, objective=TSDKDConfig(k=4), adaptive=None, compiled=False, source=source)
    model.forward = partial(DistillationTrainer.training_forward, trainer, model)
    if rank is not None:
        mesh = init_device_mesh("cpu", (2,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    hidden = x["hidden"].view(4, 5, -1)[rows].flatten(0, 1)
    loss, _ = model(
        input_ids=x["ids"][rows],
        attention_mask=torch.ones_like(x["ids"][rows]),
        position_ids=torch.arange(8).expand(4, -1)[rows],
        predicting=x["predicting"][rows],
        response_mask=x["mask"][rows],
        teacher=TeacherHidden(hidden, Head(x["weight"])),
    )
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad if rank is None else grad.full_tensor() for name, grad in found.items()}


def save_sharded_gradients(rank: int, path: Path, directory: str, mixed: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    found = gradients(path, rank, mixed)
    if rank == 0:
        torch.save(found, f"{directory}/found")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mixed", [False, True])
def test_sharded_weights_get_the_gradients_of_unsharded_ones(student: Path, mixed: bool) -> None:
    expected = gradients(student, None)
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(save_sharded_gradients, args=(student, directory, mixed), nprocs=2)
        found = torch.load(f"{directory}/found")
    for name, other in expected.items():
        apart = float((found[name] - other).norm() / other.norm())
        assert apart < (0.1 if mixed else 1e-5), name


def check_copy(rank: int, path: Path, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    reader = load_model(str(path), "bfloat16")
    expected = {name: value.clone() for name, value in reader.model.state_dict().items()}
    fully_shard(reader.model, mesh=init_device_mesh("cpu", (2,)))
    state = torch.get_rng_state()
    copy = distributed_models.unsharded(reader)
    found = copy.model.state_dict()
    assert copy is not reader
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    assert copy.end_ids == reader.end_ids == [5, 9, 257]
    assert torch.equal(torch.get_rng_state(), state)
    torch.distributed.destroy_process_group()


def test_an_unsharded_copy_is_the_same_model(student: Path, tmp_path: Path) -> None:
    """The copy has the same weights, precision and end tokens, and does not change the random state."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = [5, 9]
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(check_copy, args=(tmp_path / "model", str(tmp_path)), nprocs=2)
