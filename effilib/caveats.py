"""What must be said wherever accuracies are shown: too short, too few images, one class above all."""

__all__ = ["caveats"]

FEW_STEPS = 30  # after which 4 % of BatchNorm's running statistics are still those of the start
COARSE = 1.0  # points that one image may count
LOPSIDED = 1.5  # times a class's fair share


def caveats(
    *, steps: int = FEW_STEPS, held_out: int = 0, majority: float = 0.0, classes: int = 1
) -> list[str]:
    """Return what limits the accuracies of a training, in sentences.

    steps: of the shortest. held_out: images that accuracies are of. majority: share of the largest class
    among these, in %.

    >>> caveats(steps=100, held_out=1000, majority=11.0, classes=10)
    []
    >>> for sentence in caveats(steps=8, held_out=60, majority=95.0, classes=2):
    ...     print(sentence)
    A training of 8 steps is too short: 43 % of BatchNorm's running statistics are still those of the ...
    One of 60 held-out images is 1.7 points: smaller differences cannot be seen.
    The largest class has 95 % of the images. Always naming it is right as often.
    """
    found = []
    if steps < FEW_STEPS:
        found.append(
            f"A training of {steps} steps is too short: {100 * 0.9**steps:.0f} % of BatchNorm's running "
            "statistics are still those of the start, so that accuracies may lie near chance (more epochs or "
            "a smaller batch_size help)."
        )
    if held_out and 100 / held_out > COARSE:
        point = f"{100 / held_out:.1f} points"
        found.append(f"One of {held_out} held-out images is {point}: smaller differences cannot be seen.")
    if majority > LOPSIDED * 100 / classes:
        share = f"{majority:.0f} % of the images"
        found.append(f"The largest class has {share}. Always naming it is right as often.")
    return found
