"""Recipes: typed, complete, and refused before any work begins."""

import tomllib
from pathlib import Path

import pytest

from prg.errors import RecipeError
from prg.recipe import load_recipe, parse_recipe
from prg.recipes import shipped_recipes
from prg.training.run import open_run

MINIMAL = """
about = "mine"
network = "tiny16"
image = {size = 16, resize = 16}
[pretrain]
epochs = 1
[finetune]
epochs = 1
"""


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    assert parse_recipe(recipe.model_dump(mode="json"), name) == recipe


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("colour = 1", "colour"),
        ("[pretrain]\nlearning_rate = 1", "pretrain.learning_rate"),
        ("seed = 'one'", "seed"),
        ("network = 'huge'", "network = 'huge'"),
        ("[image]\nsize = 32\nresize = 32", "image.size = 32"),
        ("[image]\nresize = 8", "resize = 8"),
        ("[pretrain]\nlr = -1", "lr = -1"),
        ("[finetune]\nt_end = [1.0]", "t_end"),
        ("[finetune]\nt_end = []", "t_end"),
        ("[finetune]\nbeta = -0.1", "beta"),
        ("[finetune]\nfreeze = true\nhead = 'linear'\nmixup = 0.2", "mixup = 0.2"),
        ("[finetune]\nfreeze = true", "head = 'mlp'"),
        ("[finetune]\npenalties = []", "penalties"),
        ("[pretrain]\naugment = ['blur']", "pretrain.augment"),
        ("[encoder]\nsolver = 'rk5'", "rk5"),
        ("[encoder]\nsteps = 0", "steps"),
        ("[encoder]\nlayers = []", "layers"),
        ("[encoder]\nlayers = ['top']", "['top']"),
        ("[pretrain]\nepochs = true", "pretrain.epochs"),
        ("[pretrain]\nepochs = inf", "epochs = inf"),
        ("[pretrain]\nbetas = [1.5, 0.9]", "pretrain.betas.0 = 1.5"),
        ("[pretrain]\nweight_decay = -1", "weight_decay = -1"),
        ("[pretrain]\nlr_min = 2.0", "lr_min = 2.0"),
        ("[finetune]\nlabel_smoothing = 2", "label_smoothing = 2"),
        ("[serve]\nt_end = 2", "t_end = 2"),
        ("[data]\nvalidation = nan", "data.validation = nan"),
        ("[image]\nstd = [0, 0, 0]", "image.std.0 = 0"),
        ("seed = -1", "seed = -1"),
        ("seed = 4611686018427387904", "seed = 4611686018427387904"),
        ("[data]\nlabels = ['a', 'b', 'a']", "labels = ('a', 'b', 'a')"),
        ("[data]\nlabels = ['a', '']", "labels = ('a', '')"),
        ("[network]\nimage_size = 16\nchannels = 16\nmultipliers = []", "multipliers = ()"),
        ("[network]\nimage_size = 16\nchannels = 0\nmultipliers = [1]", "channels = 0"),
        ("[network]\nimage_size = 16\nchannels = 16\nmultipliers = [1]\npatch = 0", "patch = 0"),
    ],
)
def test_what_is_wrong_is_named(line: str, named: str) -> None:
    table = tomllib.loads(MINIMAL)
    for key, value in tomllib.loads(line).items():
        # Sections are added to; a network is another one.
        old = table.get(key) if key != "network" else None
        table[key] = old | value if isinstance(old, dict) else value
    with pytest.raises(RecipeError) as error:
        parse_recipe(table, "mine.toml")
    assert str(error.value).startswith("mine.toml: ")
    assert named in str(error.value)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(MINIMAL)
    return tmp_path / "mine.toml"


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, mine: Path) -> None:
    mine.write_text(MINIMAL + "weight_decai = 1\n")
    with pytest.raises(RecipeError, match=r"finetune\.weight_decai.* weight_decay\b"):
        load_recipe(str(mine))
    mine.write_text("= 3")
    for name in ("none", "none.toml", str(mine)):
        with pytest.raises(RecipeError, match=name):
            load_recipe(name)
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(RecipeError, match="recipe.json"):
        open_run(tmp_path, None)


def test_overrides(mine: Path) -> None:
    recipe = load_recipe(str(mine), ["seed=7", "finetune.t_end=[0.5, 0.6]", "data.source=some/dataset"])
    assert (recipe.seed, recipe.finetune.t_end, recipe.data.source) == (7, (0.5, 0.6), "some/dataset")
    for bad in ("seed", "seed.x=1", "nothing=1", "seed=2024-01-01"):
        with pytest.raises(RecipeError, match=bad[:4]):
            load_recipe(str(mine), [bad])


def test_a_recipe_holds_what_differs_from_the_one_it_extends(tmp_path: Path, mine: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text('about = "other"\nextends = "mine.toml"\n[finetune]\nbatch = 7\n')
    recipe, base = load_recipe(str(path)), load_recipe(str(mine))
    assert (recipe.about, recipe.finetune.batch, recipe.finetune.epochs) == ("other", 7, 1)
    assert (recipe.network, recipe.image, recipe.pretrain) == (base.network, base.image, base.pretrain)
    path.write_text(f'about = "other"\nextends = "{path}"\n')
    with pytest.raises(RecipeError, match="extends"):
        load_recipe(str(path))
