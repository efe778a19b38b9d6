"""Networks of diffusers: imported, they answer as they did there, and go on like our own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from workshop import answer, evaluated, exported, image_folder, refusal

from entry.config import read_entry
from prg.checkpoint import load_strictly
from prg.errors import CheckpointError, DataError
from prg.importers.diffusers import WEIGHTS, import_diffusers
from prg.paths import vp_alpha, vp_sigma
from prg.training.finetune import finetune
from prg.training.pretrain import pretrain
from prg.training.run import open_run
from prg.unet import UNet

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
"""google/ddpm-cifar10-32."""
SMALL = CIFAR10 | {"sample_size": 16, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}
OTHER = SMALL | {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 1,
}
"""Every choice that SMALL does not make."""


SAFE = f"{WEIGHTS}.safetensors"


def saved_network(folder: Path, shape: dict[str, Any]) -> Any:
    """A network of diffusers with weights that all matter, saved with its scheduler; returns the network."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**shape).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    net.save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)
    return net


def imported(folder: Path) -> UNet:
    """The network of a folder as an import makes it."""
    made = import_diffusers(folder, "images-32")
    net = UNet(made.recipe.unet).eval()
    load_strictly(net, made.net, folder)
    return net


def refused(folder: Path, *named: str) -> None:
    """Refused with a message that names the folder and these."""
    with pytest.raises(CheckpointError) as error:
        imported(folder)
    assert [part for part in (str(folder), *named) if part not in str(error.value)] == []


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    saved_network(folder, SMALL)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(original, tmp_path / "ddpm")


@pytest.mark.parametrize("shape", [SMALL, OTHER, CIFAR10], ids=["small", "other", "ddpm-cifar10-32"])
def test_the_imported_network_equals_the_original(shape: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_network(tmp_path, shape)
    ours = imported(tmp_path)
    side = shape["sample_size"]
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0.0, 250.0, 999.0])
    with torch.inference_mode():
        expected = theirs(x, index).sample
        found = ours(x, 1 - (index + 1) / 1000)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_continuous_path_is_the_discrete_schedule() -> None:
    index = torch.arange(0, 1000, 37)
    t = 1 - (index + 1) / 1000
    discrete = diffusers.DDPMScheduler().alphas_cumprod[index].sqrt()
    torch.testing.assert_close(vp_alpha(t), discrete, atol=2e-3, rtol=0)
    torch.testing.assert_close(vp_sigma(t), (1 - discrete**2).sqrt(), atol=3e-3, rtol=0)


def test_it_fine_tunes_evaluates_exports_like_our_own(original: Path, tmp_path: Path) -> None:
    photos, folder = image_folder(tmp_path / "photos", each=24), tmp_path / "run"
    settings = ("finetune.epochs=0.5", "finetune.batch=8", "finetune.precision=fp32", "data.validation=0.5")
    flags = [part for item in settings for part in ("--set", item)]
    command = ["import", "diffusers", original, folder, "--recipe", "images-32", "--data", photos]
    assert "prg finetune" in answer(*command, *flags)
    run = open_run(folder)
    image = run.recipe.image
    assert (run.recipe.encoder.path, image.size, image.mean) == ("vp", 16, (0.5, 0.5, 0.5))
    finetune(run)
    assert evaluated(folder)[0] == "photos/test"
    entry = exported(folder, tmp_path / "models" / "ddpm")
    prg = read_entry(entry).prg
    assert (prg.path, prg.labels, prg.versions["1"].held_out) == ("vp", ("blue", "green", "red"), None)
    training = prg.versions["1"].training
    assert training["history"][0].startswith("import: diffusers ")
    assert str(tmp_path) not in json.dumps(training)
    for target, data in ((folder, None), (entry, photos)):  # what it saw elsewhere, nobody knows
        with pytest.raises(DataError, match="--seen"):
            evaluated(target, data, "train")
    with pytest.raises(CheckpointError, match="--init"):
        pretrain(run)


@pytest.mark.parametrize(
    "layout", ["pipeline", "old names in a pickle", f"{SAFE}.index.json", f"{SAFE}.index.fp16.json"]
)
def test_other_layouts_of_the_same_network(layout: str, folder: Path, original: Path) -> None:
    if layout == "pipeline":
        for name, part in (("config.json", "unet"), (SAFE, "unet"), ("scheduler_config.json", "scheduler")):
            (folder / part).mkdir(exist_ok=True)
            (folder / name).rename(folder / part / name)
    elif ".index." in layout:
        change(folder / "config.json", sample_size=[16, 16])
        diffusers.UNet2DModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*-of-*"))) > 1
        (folder / SAFE).unlink(missing_ok=True)
        (folder / f"{SAFE}.index.json").rename(folder / layout)
    else:
        tensors = load_file(folder / SAFE)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
        torch.save(tensors, folder / f"{WEIGHTS}.bin")
        (folder / SAFE).unlink()
    found, expected = (imported(path).state_dict() for path in (folder, original))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_shards_that_lack_and_shards_without_an_index(folder: Path) -> None:
    shards = [f"{WEIGHTS}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / SAFE).rename(folder / shards[0])
    refused(folder, f"{SAFE}.index.json", shards[0])
    index = folder / f"{SAFE}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    refused(folder, f"{index}: ", shards[1])
    index.write_text("[]")
    refused(folder, f"{index}: ", "weight_map")


def test_a_variant_is_read_where_it_is_the_only_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp16, other = (f"{WEIGHTS}.{kind}.safetensors" for kind in ("fp16", "non_ema"))
    save_file({k: v.half() for k, v in load_file(folder / SAFE).items()}, folder / fp16)
    plain = imported(folder).state_dict()  # the full ones go before it
    assert fp16 not in capsys.readouterr().err
    (folder / SAFE).unlink()
    half = imported(folder).state_dict()
    assert fp16 in capsys.readouterr().err
    assert all(torch.equal(half[k], v.half().float()) for k, v in plain.items())
    assert any(not torch.equal(half[k], v) for k, v in plain.items())
    shutil.copy(folder / fp16, folder / other)
    refused(folder, fp16, other)


def test_what_is_no_network_of_ours_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    whole = config.read_text()
    for key, value, named in (
        ("_class_name", "UNet2DConditionModel", ""),
        ("in_channels", 4, ""),
        ("down_block_types", ["ResnetDownsampleBlock2D"] * 4, "down_block_types.0 is 'ResnetDown"),
        ("block_out_channels", [8, 12, 16, 16], "block_out_channels (8, 12, 16, 16)"),
        ("layers_per_block", 3, "down_blocks.0.resnets.2"),
        ("layers_per_block", 1, "down_blocks.0.resnets.1"),
        ("sample_size", 20, "20"),
        ("sample_size", -16, ""),
        ("sample_size", [16, 32], ""),
        ("new_trick", True, ""),
        ("block_out_channels", 8, ""),
        ("block_out_channels", [0, 8, 8, 8], "block_out_channels.0 is 0"),
        ("attention_head_dim", [8, 8], ""),
        ("norm_num_groups", None, ""),
    ):
        config.write_text(json.dumps(json.loads(whole) | {key: value}))
        refused(folder, named or f"{key} is {value!r}")


def test_what_was_trained_on_another_schedule_is_refused(folder: Path) -> None:
    scheduler = folder / "scheduler_config.json"
    whole = scheduler.read_text()
    for key, value in (
        ("beta_schedule", "squaredcos_cap_v2"),
        ("num_train_timesteps", 4000),
        ("prediction_type", "v_prediction"),
        ("_class_name", "EDMEulerScheduler"),
        ("use_flow_sigmas", True),
    ):
        scheduler.write_text(json.dumps(json.loads(whole) | {key: value}))
        refused(folder, f"{key} is {value!r}")
    scheduler.write_text("[]")
    refused(folder, "scheduler_config.json: ", "[]")


@pytest.mark.parametrize("name", ["logvar", 7])
def test_a_tensor_of_another_name(name: str | int, folder: Path) -> None:
    torch.save({**load_file(folder / SAFE), name: torch.zeros(1)}, folder / f"{WEIGHTS}.bin")
    (folder / SAFE).unlink()
    refused(folder, f"{WEIGHTS}.bin: ", str(name) if name == "logvar" else "")


@pytest.mark.parametrize("missing", ["scheduler_config.json", "config.json", SAFE])
def test_what_is_missing_is_named_and_no_run_is_left(folder: Path, tmp_path: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert missing in refusal("import", "diffusers", folder, tmp_path / "run", "--recipe", "images-32")
    assert not (tmp_path / "run").exists()
