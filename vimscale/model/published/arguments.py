"""Arguments of the constructors of published Vision Mambas: converts them to a VimConfig and back. Needs no torch.

Three families: `vim` (hustvl/Vim, arXiv:2401.09417), `mambar` (wangf3014/Mamba-Reg, arXiv:2405.14858) and `arm`
(OliverRensu/ARM as fine-tuned, arXiv:2406.07537). What their code does and a VimConfig cannot express is a quirk: see
`vimscale.model.published.quirks`.
"""

import reprlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from vimscale.errors import CheckpointError
from vimscale.model.presets import ClassToken, Pool, VimConfig

Family = Literal["vim", "mambar", "arm"]
Arguments = dict[str, Any]
FORMATS: dict[Family, str] = {"vim": "hustvl", "mambar": "mambar", "arm": "arm"}
"""What `vimscale export --to` calls the layout of each family."""

_COMMON: Arguments = {
    "img_size": 224,
    "patch_size": 16,
    "depth": 24,
    "embed_dim": 192,
    "channels": 3,
    "num_classes": 1000,
    "ssm_cfg": None,
    "drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "norm_epsilon": 1e-5,
}
_SWITCHES: Arguments = {
    "ft_seq_len": None,
    "pt_hw_seq_len": 14,
    "if_bidirectional": False,
    "final_pool_type": "none",
    "if_rope": False,
    "if_rope_residual": False,
    "flip_img_sequences_ratio": -1.0,
    "if_bimamba": False,
    "init_layer_scale": None,
    "use_double_cls_token": False,
}
DEFAULTS: dict[Family, Arguments] = {
    "vim": {
        **_COMMON,
        **_SWITCHES,
        "stride": 16,
        "d_state": 16,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "if_abs_pos_embed": True,
        "bimamba_type": "v2",
        "if_cls_token": True,
        "if_divide_out": True,
        "use_middle_cls_token": True,
    },
    "mambar": {
        **_COMMON,
        "rms_norm": False,
        "residual_in_fp32": False,
        "fused_add_norm": False,
        "num_cls_tokens": 1,
        "cls_reduce": 1,
    },
    "arm": {
        **_COMMON,
        **_SWITCHES,
        "stride": 16,
        "rms_norm": False,
        "residual_in_fp32": False,
        "fused_add_norm": False,
        "if_abs_pos_embed": False,
        "bimamba_type": "none",
        "if_cls_token": False,
        "if_devide_out": False,
        "use_middle_cls_token": False,
        "global_pool": False,
    },
}
"""Arguments that each family's constructor takes, with its defaults."""
_WITHOUT_EFFECT = {"device", "dtype", "initializer_cfg", "pretrained"}
"""Arguments that do not affect a model whose weights come from a file."""
_SCAN_INIT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"}

_PLAIN: Arguments = {"patch_size": 16, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
_VIM = {
    **_PLAIN,
    "depth": 24,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "use_middle_cls_token": True,
}
_ARM = {
    **_PLAIN,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "if_rope_residual": False,
    "bimamba_type": "v3",
    "if_cls_token": True,
    "if_devide_out": True,
    "use_middle_cls_token": True,
}
_TAIL = "bimambav2_final_pool_mean_abs_pos_embed_with"
PUBLISHED: dict[str, Arguments] = {
    f"vim_tiny_patch16_224_{_TAIL}_midclstok_div2": {**_VIM, "embed_dim": 192},
    f"vim_tiny_patch16_stride8_224_{_TAIL}_midclstok_div2": {**_VIM, "embed_dim": 192, "stride": 8},
    f"vim_small_patch16_224_{_TAIL}_midclstok_div2": {**_VIM, "embed_dim": 384},
    f"vim_small_patch16_stride8_224_{_TAIL}_midclstok_div2": {**_VIM, "embed_dim": 384, "stride": 8},
    f"vim_base_patch16_224_{_TAIL}_middle_cls_token_div2": {**_VIM, "embed_dim": 768, "d_state": 16},
    "mambar_tiny_patch16_224": {**_PLAIN, "embed_dim": 192, "depth": 24, "num_cls_tokens": 12},
    "mambar_small_patch16_224": {**_PLAIN, "embed_dim": 384, "depth": 24, "num_cls_tokens": 12, "cls_reduce": 2},
    "mambar_base_patch16_224": {**_PLAIN, "embed_dim": 768, "depth": 24, "num_cls_tokens": 12, "cls_reduce": 4},
    "mambar_large_patch16_224": {**_PLAIN, "embed_dim": 1024, "depth": 48, "num_cls_tokens": 16, "cls_reduce": 8},
    "arm_base_pz16": {**_ARM, "embed_dim": 768, "depth": 12},
    "arm_large_pz16": {**_ARM, "embed_dim": 1024, "depth": 24},
    "arm_huge_pz16": {**_ARM, "embed_dim": 1536, "depth": 24},
}
"""Arguments that each published function sets, by its name; the caller sets image size, number of classes and rates."""


def family(arguments: Arguments) -> Family:
    """Tell the family by its arguments."""
    if "num_cls_tokens" in arguments or "cls_reduce" in arguments:
        return "mambar"
    return "arm" if arguments.get("bimamba_type") == "v3" else "vim"


def complete(arguments: Arguments) -> Arguments:
    """Complete the arguments with the constructor's defaults, in its spelling.

    Raises:
        CheckpointError: the constructor does not take a name or a value, or two of them contradict each other.
    """
    kind = family(arguments)
    spelled, other = ("if_devide_out", "if_divide_out") if kind == "arm" else ("if_divide_out", "if_devide_out")
    given = {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}
    if kind != "mambar" and other in given:
        value = given.pop(other)
        if given.setdefault(spelled, value) != value:
            raise CheckpointError(
                f"if_divide_out and if_devide_out are the same argument, but one is {value} and the other is not"
            )
    if unknown := sorted(given.keys() - DEFAULTS[kind].keys()):
        raise CheckpointError(
            f"{', '.join(name[:_NAME] for name in unknown[:_SHOWN])}: the published {kind} constructor has no such"
            f" argument; it takes {', '.join(sorted(DEFAULTS[kind]))}"
        )
    if isinstance(given.get("img_size"), list):  # from JSON
        given["img_size"] = tuple(given["img_size"])
    _refuse(
        f"{name} is {reprlib.repr(value)}; it must be {_RULES[name][0]}"
        for name, value in given.items()
        if not _RULES[name][1](value)
    )
    return DEFAULTS[kind] | given


def _refuse(faults: Iterable[str]) -> None:
    """Raise a CheckpointError that lists the first faults, if there are any."""
    if shown := list(faults)[:_SHOWN]:
        raise CheckpointError("".join([_NO_MODEL, *(f"\n  {fault}" for fault in shown)]))


_NO_MODEL = "the published arguments do not make a model"
_SHOWN, _NAME = 4, 40
"""Faults or names that an error lists, and characters of each name."""
_Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""
_LARGEST = 4096
"""Pixels per side; no published Vision Mamba is for images near that size."""
_MOST_PATCHES = 2**20


def _whole(least: int, most: int) -> _Rule:
    return f"a whole number from {least} to {most:,}", lambda value: type(value) is int and least <= value <= most


def _number(low: float, high: float) -> _Rule:
    return f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high


def _or_none(rule: _Rule) -> _Rule:
    return f"{rule[0]}, or null", lambda value: value is None or rule[1](value)


def _size(value: Any) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(type(side) is int and 1 <= side <= _LARGEST for side in sides)


_YES_OR_NO: _Rule = "true or false", lambda value: isinstance(value, bool)
_WORD: _Rule = "a word", lambda value: isinstance(value, str)
_RULES: dict[str, _Rule] = {
    **{name: _YES_OR_NO for kind in DEFAULTS.values() for name, value in kind.items() if isinstance(value, bool)},
    **dict.fromkeys(("final_pool_type", "bimamba_type"), _WORD),
    **dict.fromkeys(("patch_size", "stride", "channels", "d_state", "cls_reduce"), _whole(1, _LARGEST)),
    **dict.fromkeys(("num_classes", "num_cls_tokens"), _whole(0, 10**6)),
    **dict.fromkeys(("drop_rate", "drop_path_rate"), _number(0, 1)),
    "img_size": (f"a whole number from 1 to {_LARGEST:,}, or two of them", _size),
    "depth": _whole(1, 10_000),
    "embed_dim": _whole(1, 10**6),
    "norm_epsilon": _number(0, 1),
    "flip_img_sequences_ratio": _number(-1e9, 1e9),
    "init_layer_scale": _or_none(_number(-1e9, 1e9)),
    "ft_seq_len": _or_none(_whole(1, _LARGEST)),
    "pt_hw_seq_len": _whole(1, _LARGEST),
    "if_bidirectional": ('true, false or "halved"', lambda value: isinstance(value, bool) or value == "halved"),
    "ssm_cfg": _or_none(("the mixer's arguments by name", lambda value: isinstance(value, dict))),
}
"""The rule for each argument."""


def config_of(arguments: Arguments) -> VimConfig:
    """Convert complete arguments to a VimConfig, without their quirks.

    Raises:
        CheckpointError: the published code cannot run such a model either, or the model has parts that ours lacks.
    """
    kind = family(arguments)
    ssm = _ssm(arguments, kind)
    _refuse(_faults(arguments, kind))
    depth, d = arguments["depth"], arguments["embed_dim"]
    shape: dict[str, Any] = {
        "num_classes": max(arguments["num_classes"], 1),  # without a head: see quirks
        "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"],
        "d_model": d,
        "depth": depth,
        "d_state": ssm.get("d_state", arguments.get("d_state", 16)),
        "d_conv": ssm.get("d_conv", 4),
        "expand": 1 if kind == "arm" else ssm.get("expand", 2),
        "norm": "rms" if arguments["rms_norm"] and kind != "arm" else "layer",
        "norm_eps": 1e-5 if kind == "arm" else arguments["norm_epsilon"],
        "layer_scale": arguments.get("init_layer_scale"),
        "drop_path": arguments["drop_path_rate"],
        "init": "published",
    }
    if kind != "mambar" and arguments["stride"] != arguments["patch_size"]:
        shape["stride"] = arguments["stride"]
    if kind == "mambar":
        registers, reduce = arguments["num_cls_tokens"], arguments["cls_reduce"]
        shape |= {"cls_token": "none", "registers": registers, "pool": "registers", "register_reduce": reduce}
        shape["directions"] = f"bi*{depth}"
    elif kind == "arm":
        shape |= {"directions": f"cross*{depth}", "mlp": "swiglu", "cls_token": "middle"}
        shape["pool"] = "mean" if arguments["global_pool"] else None
    else:
        shape |= _vim(arguments)
    try:
        config = VimConfig(**shape)
    except ValueError as error:
        raise CheckpointError(f"{_NO_MODEL}\n  {error}") from None
    if config.patches > _MOST_PATCHES:
        raise CheckpointError(f"{_NO_MODEL}\n  {config.patches:,} patches per image; at most {_MOST_PATCHES:,}")
    return config


def _vim(arguments: Arguments) -> dict[str, Any]:
    """Return the fields of VimConfig that only the family `vim` decides."""
    kind = {"none": "fwd", "v1": "shared", "v2": "bi"}[scan_type(arguments)]
    cls_token: ClassToken = "none"
    pool: Pool | None = None
    if not arguments["if_cls_token"]:
        pool = "last" if arguments["final_pool_type"] == "none" else "mean"
    elif arguments["use_double_cls_token"]:
        cls_token = "both"
    else:
        cls_token = "middle" if arguments["use_middle_cls_token"] else "first"
    # neither v1 nor the slow path divides
    halved = arguments["if_divide_out"] and kind != "shared" and not slow(arguments)
    return {
        "directions": f"{kind}*{arguments['depth']}",
        "cls_token": cls_token,
        "pool": pool,
        "pos_embed": arguments["if_abs_pos_embed"],
        "fuse": "mean" if halved else "sum",
    }


def scan_type(arguments: Arguments) -> str:
    """Return bimamba_type, or v1 where the older if_bimamba asks for it."""
    return "v1" if arguments["if_bimamba"] else arguments["bimamba_type"]


def quirks(arguments: Arguments) -> list[str]:
    """List the names of the (complete) arguments that ask for something only `PublishedVim` does."""
    requested = {
        "num_classes": arguments["num_classes"] < 1,
        "channels": arguments["channels"] != 3,
        "drop_rate": arguments["drop_rate"] > 0,
        "ssm_cfg": slow(arguments),
        "if_rope": arguments.get("if_rope", False),
        "if_bidirectional": arguments.get("if_bidirectional", False),
        "flip_img_sequences_ratio": arguments.get("flip_img_sequences_ratio", -1) > 0,
        "final_pool_type": arguments.get("final_pool_type") == "max"
        or (arguments.get("final_pool_type") == "all" and not arguments["if_cls_token"]),
    }
    if arguments.get("bimamba_type") == "v3":  # ARM's code takes these and ignores them
        for name in ("if_bidirectional", "flip_img_sequences_ratio", "final_pool_type"):
            requested[name] = False
    return [name for name, is_requested in requested.items() if is_requested]


def slow(arguments: Arguments) -> bool:
    """Whether the arguments ask for the mixer's slow path, which runs only the forward direction."""
    return not (arguments["ssm_cfg"] or {}).get("use_fast_path", True)


def _ssm(arguments: Arguments, kind: Family) -> dict[str, Any]:
    """Return the mixer's arguments.

    Raises:
        CheckpointError: an argument is unknown, or its value cannot be.
    """
    ssm = dict(arguments["ssm_cfg"] or {})
    rank = -(-arguments["embed_dim"] // 16)
    fixed = {"dt_rank": ("auto", rank), "conv_bias": (True,), "bias": (False,)}
    faults = [
        f"ssm_cfg.{name} is {reprlib.repr(ssm[name])}; only {values[0]!r} is supported"
        for name, values in fixed.items()
        if name in ssm and ssm[name] not in values
    ]
    faults += [
        f"ssm_cfg.{name} is {reprlib.repr(ssm[name])}; it must be {_whole(1, _LARGEST)[0]}"
        for name in ("d_state", "d_conv", "expand")
        if name in ssm and not _whole(1, _LARGEST)[1](ssm[name])
    ]
    known = {"d_state", "d_conv", "expand", "use_fast_path"} | fixed.keys() | _SCAN_INIT
    unknown = [name for name in ssm if name not in known]
    faults += [f"ssm_cfg.{str(name)[:_NAME]}: the published mixer has no such argument" for name in unknown]
    passed = {"vim": "d_state", "arm": "expand", "mambar": ""}[kind]
    if passed in ssm:
        faults.append(f"ssm_cfg.{passed}: the constructor passes {passed} itself and fails if it is given twice")
    if kind != "vim" and slow(arguments):
        faults.append("ssm_cfg.use_fast_path false is not supported; leave it out")
    _refuse(faults)
    return ssm


def _faults(arguments: Arguments, kind: Family) -> list[str]:
    """List what the published code fails on or ours lacks."""
    faults = []
    if kind == "mambar":
        m, reduce, d = arguments["num_cls_tokens"], arguments["cls_reduce"], arguments["embed_dim"]
        if m < 1:
            faults.append(f"num_cls_tokens is {m}; the head reads them, so there must be at least one")
        elif m % reduce or d % reduce:
            faults.append(f"cls_reduce {reduce} must divide num_cls_tokens {m} and embed_dim {d}")
        return faults
    rows, columns = grid(arguments)
    if kind == "arm":
        if not arguments["if_abs_pos_embed"] or not arguments["if_cls_token"]:
            faults.append("ARM always has a class token and a position embedding: set both to True")
        if arguments["use_double_cls_token"]:
            faults.append("use_double_cls_token: ARM reads one class token, in the middle")
        if arguments["if_rope"]:
            faults.append("if_rope: ARM's code does not define it")
        if rows != columns or rows % 2:
            faults.append(
                f"img_size: ARM's column scans need a square grid with an even number of rows, not {rows} x {columns}"
            )
        return faults
    if scan_type(arguments) not in ("none", "v1", "v2"):
        faults.append(f"bimamba_type is {reprlib.repr(scan_type(arguments))}; known: none, v1, v2, and v3 for ARM")
    if arguments["final_pool_type"] not in ("none", "mean", "max", "all"):
        faults.append(f"final_pool_type is {reprlib.repr(arguments['final_pool_type'])}; known: none, mean, max, all")
    if arguments["if_rope"]:
        faults += _rope_faults(arguments, rows * columns)
    return faults


def _rope_faults(arguments: Arguments, patches: int) -> list[str]:
    size, d = arguments["img_size"], arguments["embed_dim"]
    if not isinstance(size, int):
        return [f"if_rope: img_size is {size}; the published code makes tables only for squares"]
    faults = [f"if_rope: embed_dim {d} is not a multiple of 4"] if d % 4 else []
    cls = arguments["if_cls_token"] * (1 + arguments["use_double_cls_token"])
    rotated = patches + cls - (patches + cls) % 2  # an odd number of tokens: the first is taken for the class token
    table = (size // arguments["patch_size"]) ** 2
    if rotated != table:
        faults.append(
            f"if_rope: the table is for {table} tokens (img_size // patch_size squared), but {rotated} of"
            f" {patches + cls} would be rotated; the published code fails there too"
        )
    return faults


def grid(arguments: Arguments) -> tuple[int, int]:
    """Return rows and columns of patches."""
    size, patch = arguments["img_size"], arguments["patch_size"]
    rows, columns = size if isinstance(size, tuple) else (size, size)
    stride = arguments.get("stride", patch)
    return (rows - patch) // stride + 1, (columns - patch) // stride + 1


# ---- from a VimConfig back to arguments


def arguments_of(config: VimConfig, of: Family | None = None) -> Arguments:
    """Return the published constructor's arguments for a model of ours. `of`: the family; default: whichever it is.

    Raises:
        CheckpointError: no published constructor, or none of that family, makes such a model; the message says why.
    """
    kinds = {layer.kind for layer in config.layers}
    kind: Family = "vim"
    if of is not None:
        kind = of
    elif config.pooling == "registers":
        kind = "mambar"
    elif kinds == {"cross"} or config.mlp != "none":
        kind = "arm"
    if obstacles := _obstacles(config, kind):
        fix = next((name for other, name in FORMATS.items() if not _obstacles(config, other)), "safetensors")
        raise CheckpointError(
            f"the published {kind} code cannot express this model\n"
            + "\n".join(f"  {obstacle}" for obstacle in obstacles)
            + f"\n  export it --to {fix} instead"
        )
    arguments: Arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "depth": config.depth,
        "embed_dim": config.d_model,
        "num_classes": config.num_classes,
        "drop_path_rate": config.drop_path,
        "norm_epsilon": config.norm_eps,
        "rms_norm": config.norm == "rms",
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }
    ssm = {"d_conv": config.d_conv} if config.d_conv != 4 else {}
    if kind != "arm" and config.expand != 2:
        ssm["expand"] = config.expand
    if kind == "vim":
        arguments["d_state"] = config.d_state
    elif config.d_state != 16:
        ssm["d_state"] = config.d_state
    if kind == "mambar":
        arguments |= {"num_cls_tokens": config.registers, "cls_reduce": config.register_reduce}
    else:
        arguments |= {"stride": config.step, "if_abs_pos_embed": config.pos_embed}
        arguments |= {"final_pool_type": "none" if config.pooling == "last" else "mean"}
        arguments |= {"if_cls_token": config.cls_tokens > 0, "use_middle_cls_token": config.cls_token == "middle"}
        arguments |= {"use_double_cls_token": config.cls_token == "both", "init_layer_scale": config.layer_scale}
    if kind == "vim":
        arguments["bimamba_type"] = {"fwd": "none", "shared": "v1", "bi": "v2"}[kinds.pop()]
        arguments["if_divide_out"] = config.fuse == "mean"
    elif kind == "arm":
        arguments |= {"bimamba_type": "v3", "if_devide_out": True, "global_pool": config.pooling == "mean"}
    return complete(arguments | {"ssm_cfg": ssm or None})


def _obstacles(config: VimConfig, kind: Family) -> list[str]:
    """List what of a config the published code of this family cannot express."""
    kinds = {layer.kind for layer in config.layers}
    allowed = {"vim": {"fwd", "shared", "bi"}, "mambar": {"bi"}, "arm": {"cross"}}[kind]
    fixed: dict[str, tuple] = {"stages": ((),), "stem": ("patch",), "ssm_norm": (False,), "backward_gate": (False,)}
    fixed |= {"mlp": ("swiglu",) if kind == "arm" else ("none",), "tiles": (None,), "pos_embed": (True, False)}
    if kind == "vim":
        pools = ("mean", "last") if config.cls_token == "none" else ("cls",)
        fixed |= {"registers": (0,), "fuse": ("mean", "sum"), "pooling": pools}
    else:
        fixed |= {"fuse": ("mean",), "pos_embed": (True,)}
    if kind == "mambar":
        fixed |= {"cls_token": ("none",), "layer_scale": (None,), "step": (config.patch_size,)}
    if kind == "arm":
        fixed |= {"registers": (0,), "cls_token": ("middle",), "norm": ("layer",), "norm_eps": (1e-5,), "expand": (1,)}
        fixed["pooling"] = ("cls", "mean")
    found = [
        f"{'pool' if name == 'pooling' else name} {getattr(config, name)}: only {' or '.join(map(str, values))}"
        for name, values in fixed.items()
        if getattr(config, name) not in values
    ]
    if orders := {layer.order for layer in config.layers} - {"row"}:
        found.append(f"scans in the order {', '.join(sorted(orders))}: only row by row")
    if other := kinds - allowed:
        found.append(f"layers of kind {', '.join(sorted(other))}: only {', '.join(sorted(allowed))}")
    elif len(kinds) > 1:
        found.append(f"layers of several kinds ({config.directions}): only one kind in all layers")
    elif kinds == {"shared"} and config.fuse == "mean":
        found.append("fuse mean in layers of kind shared: v1 adds both directions and never divides")
    if kind == "mambar" and config.registers % config.register_reduce:
        found.append(f"registers {config.registers}: only a multiple of register_reduce {config.register_reduce}")
    if kind == "arm" and (config.grid[0] != config.grid[1] or config.grid[0] % 2):
        found.append(f"a grid of {config.grid[0]} x {config.grid[1]} patches: only squares with an even number of rows")
    return found
