"""What `python -m src.export` writes.

The averaged weights of the newest checkpoint as a model of diffusers where it has a class for the method, and for
UniCon as a network that takes the place of a stock pipeline's own (`form` chooses). Prints how to load what it wrote.
"""

from pathlib import Path

from omegaconf import DictConfig

from src import build
from src.adapters.unicon import UniCon
from src.backbones.base import Backbone
from src.interop.dropin import ControlledNetwork
from src.interop.export import export_adapter
from src.runs import trained_run


def main(cfg: DictConfig) -> None:
    """Read the run, write the folder, say how to load it. Raises UserError for a run or an adapter that cannot be exported."""
    run, out = Path(cfg.run), Path(cfg.out)
    trained, checkpoint = trained_run(cfg.run)
    trained.hardware.accelerator = "cpu"  # in the precision of the training: the backbone's hash is that of its rounded weights
    build.quiet()
    model = build.load_sampler(trained, checkpoint)
    adapter, backbone = model.adapter, model.backbone
    if cfg.form == "dropin" or (cfg.form == "auto" and isinstance(adapter, UniCon)):
        ControlledNetwork(backbone, adapter, trained).save_pretrained(out)
        kind = ControlledNetwork.__name__
    else:
        kind = export_adapter(adapter, out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{kind}, {size:.1f} MB, of {checkpoint}\n\n{snippet(kind, out, run, backbone, trained)}\n\nout: {out}", flush=True)


def snippet(kind: str, out: Path, run: Path, backbone: Backbone, trained: DictConfig) -> str:
    """Six lines of Python that load what was written and draw a picture as the run's validation would."""
    pipeline, sd3 = backbone.model.config("")["_class_name"], backbone.facts.family == "mmdit"
    condition, text = run / "examples" / "condition-0.png", run / "examples" / "condition-0.txt"
    shown = condition if condition.is_file() else "condition.png"
    prompt = text.read_text().strip() if text.is_file() else "a large red ball, gray floor"
    lines, parts, call = ["from diffusers.utils import load_image"], {}, {}
    if kind == ControlledNetwork.__name__:
        lines += [
            "from src.interop.dropin import ControlledNetwork",
            f'network = ControlledNetwork.from_pretrained("{out}").set_condition(load_image("{shown}"))',
        ]
        parts[backbone.NET] = "network"
    else:
        name = "adapter" if kind == "T2IAdapter" else "controlnet"
        pipeline = pipeline.replace("Pipeline", "AdapterPipeline" if name == "adapter" else "ControlNetPipeline")
        lines += [f"from diffusers import {kind}", f'network = {kind}.from_pretrained("{out}")']
        parts[name], call["control_image" if sd3 else "image"] = "network", f'load_image("{shown}")'
    # the text as in training
    if sd3:
        parts |= {} if backbone.t5_tokens else {"text_encoder_3": None, "tokenizer_3": None}
        call["max_sequence_length"] = backbone.t5_tokens
    if backbone.facts.family == "dit":
        call |= {"max_sequence_length": backbone.text_tokens, "use_resolution_binning": False, "clean_caption": False}
    call |= {"height": trained.resolution, "width": trained.resolution}
    call |= {"num_inference_steps": trained.validation.steps, "guidance_scale": trained.validation.guidance}
    lines += [
        f"from diffusers import {pipeline}",
        f'pipe = {pipeline}.from_pretrained("{backbone.model.local_folder or backbone.model.source}", {_arguments(parts)})',
        f'pipe({prompt!r}, {_arguments(call)}).images[0].save("picture.png")',
    ]
    return "\n".join(lines)


def _arguments(named: dict) -> str:
    return ", ".join(f"{k}={v}" for k, v in named.items())
