"""Networks of diffusers: imported, they answer as they did there, and go on like our own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from workshop import image_folder

from entry.config import read_entry
from prg.checkpoint import load_checkpoint, load_strictly
from prg.cli import main
from prg.errors import DataError
from prg.paths import PATHS, VelocityField, vp_alpha, vp_sigma
from prg.recipe import Data
from prg.target import open_target
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


def saved_network(folder: Path, shape: dict[str, Any]) -> Any:
    """A network of diffusers with weights that all matter, saved with its scheduler; returns the network."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**shape).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    net.save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)
    return net


def imported_network(run: Path) -> UNet:
    net = UNet(open_run(run, None).recipe.unet).eval()
    path = open_run(run, None).pretrained
    load_strictly(net, load_checkpoint(path).part("average"), path)
    return net


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


def imports(folder: Path, run: Path, *more: str) -> int:
    return main(["import", "diffusers", str(folder), str(run), "--recipe", "images-32", *more])


@pytest.mark.parametrize("shape", [SMALL, OTHER, CIFAR10], ids=["small", "other", "ddpm-cifar10-32"])
def test_the_imported_network_equals_the_original(shape: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_network(tmp_path / "ddpm", shape)
    assert imports(tmp_path / "ddpm", tmp_path / "run") == 0
    ours = imported_network(tmp_path / "run")
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


def test_it_fine_tunes_evaluates_exports_like_our_own(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, run, entry = (
        image_folder(tmp_path / "photos", each=24),
        tmp_path / "run",
        tmp_path / "models" / "ddpm",
    )
    settings = ("finetune.epochs=0.5", "finetune.batch=8", "finetune.precision=fp32", "data.validation=0.5")
    flags = [part for item in settings for part in ("--set", item)]
    assert imports(original, run, "--data", str(photos), *flags) == 0
    assert "prg finetune" in capsys.readouterr().out
    recipe = open_run(run, None).recipe
    assert (recipe.encoder.path, recipe.image.size, recipe.image.mean) == ("vp", 16, (0.5, 0.5, 0.5))
    assert main(["finetune", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert main(["export", str(run), str(entry)]) == 0
    prg = read_entry(entry).prg
    assert (prg.path, prg.labels) == ("vp", ("blue", "green", "red"))
    training = prg.versions["1"].training
    assert training["history"][0].startswith("import: diffusers ")
    assert str(tmp_path) not in json.dumps(training)
    for target, data in (
        (run, Data()),
        (entry, Data(source=str(photos))),
    ):  # what it saw elsewhere, nobody knows
        material = open_target(target, "finetune", tmp_path / target.name, data).material
        assert material.held_out is None
        with pytest.raises(DataError, match="--seen"):
            material.evaluated("train")
    assert main(["pretrain", str(run)]) == 1
    assert "was imported" in capsys.readouterr().err


def test_its_velocity_is_the_probability_flow_of_its_noise(original: Path, tmp_path: Path) -> None:
    assert imports(original, tmp_path / "run") == 0
    net = imported_network(tmp_path / "run")
    path, t = PATHS["vp"], torch.tensor([0.3])
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        noise = net(x, t)
        data = (x - path.noise_scale(t) * noise) / path.data_scale(t)
        found = VelocityField(net, predicts_noise=True)(x, t)
    torch.testing.assert_close(found, path.velocity(t, noise, data), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", ["pipeline", "old names in a pickle"])
def test_other_layouts_of_the_same_network(layout: str, folder: Path, original: Path, tmp_path: Path) -> None:
    safe = folder / "diffusion_pytorch_model.safetensors"
    if layout == "pipeline":
        for name, target in (
            ("config.json", "unet"),
            (safe.name, "unet"),
            ("scheduler_config.json", "scheduler"),
        ):
            (folder / target).mkdir(exist_ok=True)
            (folder / name).rename(folder / target / name)
    else:
        tensors = dict(diffusers.UNet2DModel.from_pretrained(folder).state_dict())
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
        safe.unlink()
    assert imports(folder, tmp_path / "run") == 0
    assert imports(original, tmp_path / "other") == 0
    found, expected = (imported_network(tmp_path / name).state_dict() for name in ("run", "other"))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


SAFE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("index", [f"{SAFE}.index.json", f"{SAFE}.index.fp16.json"])
def test_weights_in_shards(index: str, folder: Path, original: Path, tmp_path: Path) -> None:
    change(folder / "config.json", sample_size=[16, 16])
    diffusers.UNet2DModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*-of-*"))) > 1
    (folder / SAFE).unlink(missing_ok=True)
    (folder / f"{SAFE}.index.json").rename(folder / index)
    assert imports(folder, tmp_path / "run") == 0
    assert imports(original, tmp_path / "other") == 0
    found, expected = (imported_network(tmp_path / name).state_dict() for name in ("run", "other"))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_shards_that_lack_and_shards_without_an_index(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / SAFE).rename(folder / shards[0])
    assert imports(folder, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert (
        f"no weights; {SAFE}.index.json is needed, which lists the shards that are there, such as {shards[0]}"
        in said
    )
    index = folder / f"{SAFE}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert imports(folder, tmp_path / "run") == 1
    assert f"index.json: lists {shards[1]}, which is not there" in capsys.readouterr().err
    index.write_text("[]")
    assert imports(folder, tmp_path / "run") == 1
    assert "index.json: no index of weights" in capsys.readouterr().err


def test_a_variant_is_read_where_it_is_the_only_one(
    folder: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = {k: v.half() for k, v in load_file(folder / SAFE).items()}
    fp16 = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file(half, fp16)
    assert imports(folder, tmp_path / "plain") == 0  # the full ones go before it
    assert "variant" not in capsys.readouterr().err
    (folder / SAFE).unlink()
    assert imports(folder, tmp_path / "run") == 0
    assert "fp16.safetensors: a variant of the weights" in capsys.readouterr().err
    expected, found = (imported_network(tmp_path / name).state_dict() for name in ("plain", "run"))
    assert all(torch.equal(found[k], v.half().float()) for k, v in expected.items())
    shutil.copy(fp16, folder / "diffusion_pytorch_model.non_ema.safetensors")
    assert imports(folder, tmp_path / "other") == 1
    assert f"several variants: {fp16.name}, diffusion_pytorch_model.non_ema" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        (
            "scheduler_config.json",
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule is 'squaredcos_cap_v2': Input should be 'linear'",
        ),
        (
            "scheduler_config.json",
            {"num_train_timesteps": 4000},
            "num_train_timesteps is 4000: Input should be 1000",
        ),
        ("scheduler_config.json", {"prediction_type": "v_prediction"}, "Input should be 'epsilon'"),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "Input should be 'UNet2DModel'"),
        ("config.json", {"in_channels": 4}, "in_channels is 4: Input should be 3"),
        (
            "config.json",
            {"down_block_types": ["ResnetDownsampleBlock2D"] * 4},
            "Input should be 'DownBlock2D' or 'AttnDownBlock2D'",
        ),
        ("config.json", {"block_out_channels": [8, 12, 16, 16]}, "multiples of the first"),
        ("config.json", {"layers_per_block": 3}, r"no tensor down_blocks.0.resnets.2"),
        ("config.json", {"layers_per_block": 1}, "no place for: down_blocks.0.resnets.1"),
        ("config.json", {"sample_size": 20}, "must be a multiple of 8"),
        ("config.json", {"new_trick": True}, "new_trick is True: Extra inputs"),
        ("config.json", {"block_out_channels": 8}, "block_out_channels is 8"),
        ("config.json", {"block_out_channels": [0, 8, 8, 8]}, "block_out_channels.0 is 0"),
        ("config.json", {"attention_head_dim": [8, 8]}, "attention_head_dim is [8, 8]"),
        ("config.json", {"norm_num_groups": None}, "norm_num_groups is None"),
        ("config.json", {"sample_size": -16}, "sample_size is -16"),
        ("config.json", {"sample_size": [16, 32]}, "sample_size is [16, 32]: images are square here"),
        (
            "scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "_class_name is 'FlowMatch",
        ),
        ("scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
    ],
)
def test_what_is_no_ddpm_of_ours_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    keys: dict[str, object],
    said: str,
) -> None:
    change(folder / file, **keys)
    assert imports(folder, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert said in error
    assert str(folder) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_network_trained_on_something_else_is_refused(
    scheduler: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(diffusers, scheduler)().save_pretrained(folder)
    assert imports(folder, tmp_path / "run") == 1
    assert f"_class_name is {scheduler!r}" in capsys.readouterr().err
    (folder / "scheduler_config.json").write_text("[]")
    assert imports(folder, tmp_path / "run") == 1
    assert "a table of keys is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("logvar", "no place for: logvar"), (7, "not a table of tensors by name")]
)
def test_a_tensor_of_another_name(
    name: str | int, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safe = folder / "diffusion_pytorch_model.safetensors"
    torch.save({**load_file(safe), name: torch.zeros(1)}, safe.with_suffix(".bin"))
    safe.unlink()
    assert imports(folder, tmp_path / "run") == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing", ["scheduler_config.json", "config.json", "diffusion_pytorch_model.safetensors"]
)
def test_what_is_missing_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    (folder / missing).unlink()
    assert imports(folder, tmp_path / "run") == 1
    assert missing in capsys.readouterr().err
