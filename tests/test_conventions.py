"""What holds for every public function: documented, keyword-only options, keys first, names of the library."""

import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import rdx

ROOT = pathlib.Path(rdx.__file__).parent
ROOMS = sorted(f"rdx.{module.name}" for module in pkgutil.iter_modules(rdx.__path__))
PACKAGES = [name for name in ROOMS if (ROOT / name.removeprefix("rdx.") / "__init__.py").exists()]
# Names that would be read in two ways: keys are `key` or `keys`, bounds are `lower` and `upper`.
FORBIDDEN = {"rng", "rngs", "seed", "prng", "lb", "ub", "epsilon", "device"}
# Arguments that may be given by place although they have a default.
BY_PLACE = {
    "rdx.attacks.base.example_keys": {"index"},  # as natural as the inputs that it numbers
    "rdx.attacks.base.report": {"trace"},  # there or not, as the driver returns it
    "rdx.attacks.base.report_nearest": {"trace"},
    "rdx.attacks.transfer.smoothing_kernel": {"kind", "size"},  # what kernels are called by
    "rdx.balls.Ball.contains": {"tolerance"},
    "rdx.balls.check_labels": {"num_classes"},
    "rdx.data.loader.data_mesh": {"num_devices"},
    "rdx.data.loader.evaluation_batches": {"mesh"},
    "rdx.evaluate.records.summarize": {"attacks"},
    "rdx.goals.expected": {"reduction"},
    "rdx.goals.misclassify": {"loss"},  # a goal is made of its loss
    "rdx.goals.target": {"loss"},
    "rdx.metrics.rate": {"mask"},
    "rdx.metrics.wilson": {"z"},
    "rdx.models.onnx_node.Node.get": {"default"},  # as of a dict
    **{f"rdx.models.cnn.{name}": {"num_classes"} for name in (
        "a5_classifier", "bench_cnn", "cnn7", "cnn7_batch_norm", "digits_cnn", "fonts_cnn", "small_cnn",
        "small_fonts_cnn",
    )},
}
# The driver, and functions of its kind: first what they run, then keys.
KEYS_LATER = {"rdx.attacks.apgd.start", "rdx.attacks.driver.run"}
SEEDED = {"rdx.data.sampler.Sampler"}  # numbers a permutation on the host, draws nothing with jax


def _modules():
    for name in ROOMS:
        module = importlib.import_module(name)
        yield module
        for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
            yield importlib.import_module(f"{name}.{child.name}")


def _public(module):
    """Yields name and object of what a module defines and does not hide, methods included."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield f"{module.__name__}.{name}", value
        elif inspect.isclass(value):
            yield f"{module.__name__}.{name}", value
            for method, function in vars(value).items():
                is_own = inspect.isfunction(function) and function.__module__ == module.__name__
                if is_own and not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", function


MODULES = {module.__name__: module for module in _modules()}
OBJECTS = dict(item for module in MODULES.values() for item in _public(module))
FUNCTIONS = {name: value for name, value in OBJECTS.items() if inspect.isfunction(value)}


def _parameters(function):
    return list(inspect.signature(function).parameters.values())


def test_the_survey_sees_the_library():
    assert {"rdx.attacks.pgd.pgd", "rdx.bounds.crown.crown", "rdx.robustify.objective.defend", "rdx.balls.Ball.project",
            "rdx.evaluate.benchmark.evaluate", "rdx.train.loop.fit", "rdx.losses.kl"} <= set(FUNCTIONS)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_room_exports_exists_and_is_documented(package):
    room = importlib.import_module(package)
    assert room.__doc__
    assert len(set(room.__all__)) == len(room.__all__)
    for name in room.__all__:
        value = getattr(room, name)
        if inspect.ismodule(value) or callable(value):
            assert value.__doc__, f"{package}.{name}"
    hidden = {name for name, value in vars(room).items() if inspect.isfunction(value)} - set(room.__all__)
    assert not hidden


def test_every_public_object_has_a_docstring_of_its_own():
    missing = [name for name, value in OBJECTS.items() if not (value.__doc__ or "").strip()]
    # NamedTuples and dataclasses without a docstring get one made of their fields.
    made_up = [name for name, value in OBJECTS.items() if (value.__doc__ or "").startswith(f"{name.split('.')[-1]}(")]
    assert not missing + made_up
    assert not [name for name, module in MODULES.items() if not module.__doc__]


def test_docstrings_begin_with_a_sentence_in_the_third_person():
    # "Builds the ...", not "Build the ..." or "This function ...".
    wrong = [name for name, function in FUNCTIONS.items() if not re.match(r"[A-Z][a-z]+s\b", function.__doc__ or "")]
    assert not wrong


def test_options_are_keyword_only():
    by_place = {}
    for name, function in FUNCTIONS.items():
        for parameter in _parameters(function):
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty:
                by_place.setdefault(name, set()).add(parameter.name)
    assert by_place == BY_PLACE


def test_keys_come_first():
    wrong = set()
    for name, function in FUNCTIONS.items():
        names = [parameter.name for parameter in _parameters(function) if parameter.name != "self"]
        keys = {"key", "keys"} & set(names)
        keyword_only = inspect.getfullargspec(function).kwonlyargs
        if keys and names[0] not in keys and not keys <= set(keyword_only):
            wrong.add(name)
    assert wrong == KEYS_LATER


def test_forbidden_names():
    found = {
        name: bad for name, value in OBJECTS.items() if name not in SEEDED
        and (inspect.isfunction(value) or hasattr(value, "__dataclass_fields__"))
        and (bad := FORBIDDEN & {parameter.name for parameter in _parameters(value)})
    }
    assert not found


def test_files_of_techniques_cite_their_source():
    supports = {
        "base", "certify", "chunks", "composites", "cost", "details", "driver", "graph", "interval", "linear",
        "intervals", "minimal", "propagation", "relaxations", "resumption", "rewrites", "searches", "signatures",
        "tracing", "__init__",
    }
    for room in ("analyse", "attacks", "bounds", "detect", "robustify"):
        for path in sorted((ROOT / room).glob("*.py")):
            if path.stem not in supports:
                assert re.search(r"\((?:[A-Z].*?)?(?:19|20)\d\d\b|arXiv:\d{4}\.\d{5}", path.read_text()), path.name


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert len(lengths) > 40
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_the_list_of_slow_tests_names_what_there_is(request):
    listed = (ROOT.parent / "tests" / "slow.txt").read_text().splitlines()
    assert not [name for name in listed if not (ROOT.parent / name.split("::")[0]).is_file()]
    options = request.config.option
    if options.keyword or options.markexpr or any("::" in argument for argument in request.config.args):
        pytest.skip("only some tests of a file were collected")
    names = {item.nodeid.split("@")[0] for item in request.session.items}
    files = {name.split("::")[0] for name in names}
    assert not [name for name in listed if name.split("::")[0] in files and name not in names]
