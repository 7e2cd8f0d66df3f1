"""`recipe=own`: which file of conf/recipe is the one that an adapter's authors published.

Written down here, since the classes that could say so cost the import of torch. The chosen file is merged as if its name
had been typed; nothing else remembers the word.
"""

from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from src.config.compose import CONF
from src.config.messages import ConfigError, key_is

OWN, FAIR, CHOSEN = "own", "fair", "recipe@_global_"  # the last: where Hydra keeps what conf/recipe/own.yaml chose
# adapter -> family of the backbone, which is the module of its class -> recipe; for all others nothing was published
PUBLISHED: dict[str, dict[str, str]] = {
    "controlnet": {"unet": "controlnet"},
    "dit_controlnet": {"mmdit": "controlnet_sd3", "dit": "pixart_delta"},
    "scedit": {"unet": "scedit"},
    "t2i_adapter": {"unet": "t2i_adapter", "mmdit": "t2i_adapter", "dit": "t2i_adapter"},
}


def own_recipe(adapter: str, backbone: str) -> str:
    """The recipe of two options of the groups `adapter` and `backbone`, `FAIR` where there is none of its own."""
    file = CONF / "backbone" / f"{backbone}.yaml"
    return _published(adapter, OmegaConf.load(file)) if file.is_file() else FAIR  # a wrong option is refused elsewhere


def own_note(cfg: DictConfig, choices: Mapping[str, str | None]) -> str | None:
    """What `recipe=own` is for a composed configuration, in a line; None where it was not asked for. choices: Hydra's, group ->
    option.

    Raises ConfigError for a backbone that stands outside of conf/, whose recipe could not be seen in time."""
    if choices.get("recipe") != OWN:
        return None
    adapter, backbone, found = (str(choices[group]) for group in ("adapter", "backbone", CHOSEN))
    meant = _published(adapter, cfg.backbone)
    if found != meant:
        raise ConfigError(key_is("command line", "recipe", OWN, f"knows the backbones of conf/ alone; write recipe={meant}"))
    if found == FAIR:
        line = f"no recipe was published for adapter={adapter} backbone={backbone}: it is trained by recipe={FAIR}"
    else:
        line = f"adapter={adapter} backbone={backbone} is trained by recipe={found}"
    return f"recipe={OWN}: {line}" + (", and so is who trains together with it" if cfg.together else "")


def _published(adapter: str, backbone: Mapping[str, str]) -> str:
    return PUBLISHED.get(adapter, {}).get(str(backbone["_target_"]).split(".")[-2], FAIR)


OmegaConf.register_new_resolver("own_recipe", own_recipe, replace=True)  # Hydra asks it while it composes
