"""What a long training would take: hours, bytes and money, from the estimate of one step and what the reader assumes.

    python -m src.bench.budget images=2000000 steps=100000 share=0.5 price=2.5 \\
        backbone=sd3_medium adapter=unicon_half hardware=h100_8x4 hardware.micro_batch=16 budget.effective_batch=512

images: of the data set; steps: optimizer steps; share: of the bound on speed that will be reached, between 0 and 1, such as
`python -m src.bench mode=measure` finds it; price: of one device for an hour, in any currency. The other words are those of
src.train. No weight is read.

Not in it: the pass that fills the cache, validations, and time lost to other nodes.
"""

import sys
from dataclasses import dataclass

from src.vocabulary import UserError, refused_in_one_line

OWN = ("images", "steps", "share", "price")


@dataclass(frozen=True)
class Budget:
    """pass_ms, optimizer_ms: bounds of a micro-batch's forward and backward, and of the optimizer; turns: micro-batches of one
    step on one device; sizes in bytes: latents and conditions, texts, one checkpoint (weights, their average, two moments)."""

    devices: int
    per_step: int
    turns: int
    pass_ms: float
    optimizer_ms: float
    peak_gib: float
    pictures: int
    texts: int
    checkpoint: int

    def hours(self, steps: int, share: float) -> float:
        """Of training, where so much of the bound is reached."""
        return steps * (self.turns * self.pass_ms + self.optimizer_ms) / share / 3.6e6


def budget(words: list[str], images: int) -> Budget:
    """Raises UserError for a configuration that cannot be, or whose profile has no rates."""
    from src import build
    from src.bench.estimate import estimate, hollow
    from src.bench.plan import plan
    from src.config import accumulation, load
    from src.data.stores import picture_bytes, text_bytes
    from src.ranks.place import device_count

    build.quiet()
    cfg = load("train", words)
    one = ["hardware.devices=1", "hardware.nodes=1", "hardware.strategy=auto", "hardware.shard=adapter"]
    # the bound is of the step as it stands in the code
    one += ["hardware.compile=none", "hardware.cuda_graphs=false", "hardware.channels_last=false", "hardware.overlap=false"]
    kept = [w for w in words if w.split("=")[0].split(".")[0] in ("backbone", "adapter", "hardware", "resolution", "optimizer")]
    cell = plan(load("bench", [*kept, *one, f"batch={cfg.hardware.micro_batch}"]), lambda line: None)
    adapter = hollow(cell)
    told = estimate(cell, adapter)
    if told.get("step_time_ms") is None:
        raise UserError(f"hardware={cfg.hardware.name} has no rates to bound a step with; take a GPU's, e.g. hardware=h100_8")
    facts = cell.backbone.facts
    latent, condition = picture_bytes(facts, (cfg.resolution, cfg.resolution), adapter.condition_space)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    time = told["step_time_ms"]
    return Budget(
        devices=device_count(cfg.hardware),
        per_step=cfg.budget.effective_batch,
        turns=accumulation(cfg),
        pass_ms=time["forward"] + time["backward"],
        optimizer_ms=time["optimizer"],
        peak_gib=told["peak_mem_gib"],
        pictures=images * (latent + condition),
        texts=images * text_bytes(facts),
        checkpoint=4 * 4 * trained,
    )


def main(typed: list[str]) -> None:
    """Print it."""
    pairs = [word.partition("=") for word in typed]
    own = {name: value for name, _, value in pairs if name in OWN}
    words = [word for word in typed if word.partition("=")[0] not in OWN]
    if missing := [name for name in OWN if name not in own]:
        raise UserError(f"{missing[0]}= is missing: {' '.join(f'{name}=' for name in OWN)} and words of src.train")
    images, steps, share, price = int(own["images"]), int(own["steps"]), float(own["share"]), float(own["price"])
    if not 0 < share <= 1 or images < 1 or steps < 1 or price < 0:
        raise UserError(f"share={share} images={images} steps={steps} price={price}: share lies in (0, 1], the others above 0")
    found = budget(words, images)
    hours = found.hours(steps, share)
    print(
        f"{steps:,} steps of {found.per_step} images on {found.devices} devices: {steps * found.per_step / images:.1f} epochs"
    )
    bound = f"{found.turns} x {found.pass_ms:.0f} ms, and {found.optimizer_ms:.0f} ms of the optimizer"
    print(f"a device: {found.peak_gib:.1f} GiB at the peak; a step takes no less than {bound}")
    used = hours * found.devices
    told = f"{found.hours(steps, 1):.1f} h at the bound, {hours:.1f} h at {share:g} of it"
    print(f"{told}: {used:,.0f} device-hours, {used * price:,.0f} in all")
    stored = f"pictures and conditions {found.pictures / 1e9:,.0f} GB, captions {found.texts / 1e9:,.0f} GB"
    print(f"cache: {stored}; a checkpoint: {found.checkpoint / 1e9:.1f} GB")
    print(f"gradients: {found.checkpoint / 4 / 1e9:.1f} GB to average in each step, where there are several devices")


if __name__ == "__main__":
    with refused_in_one_line():
        main(sys.argv[1:])
