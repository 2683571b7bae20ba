"""Hard views: cameras near those whose pictures were most wrong take the place of some new ones."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lamina.batches import Batch
from lamina.errors import LaminaError
from lamina.objectives.hard_samples import HardSamples, check_errors, hardest


class HardViews(HardSamples):
    """The first level of active learning of fields: views near the worst of earlier epochs replace some of an epoch's.

    At the end of an epoch its cameras are ranked by the mean square error of their rays; the worst `ratio` are hard.
    Until the pool is full they are appended. Then, in every epoch after `from_epoch`, as many cameras are drawn from
    the pool without repetition and turned a little about their centres, take the place of as many cameras of the epoch,
    drawn at random, and hand their slots in the pool to the hard ones of the epoch before.

    A batch needs `origins`, `directions`, `pose_id` and `epoch`, one a row (`scenes` gives them); rows with a `pose_id`
    below 0 are no view's. A camera is read off its rays: it stands where they begin and looks along their mean, with z
    up; in the batch of a camera that was replaced the rays are moved from the one to the other.

    Args:
        ratio: share of an epoch's cameras, above 0 and below 1; at least one.
        capacity: cameras in the pool.
        jitter: largest angle, in radians, of each of three turns: about z (yaw), y (pitch), x (roll).
        from_epoch: epochs, counted from 0, up to and with which cameras are only collected.
        facing: "object": centres stay; "forward" (cameras that look one way): a new centre is drawn in the box round
            the pool's centres, enlarged by a tenth, but not out of [-bound, bound]^3 by that.
        bound: half the side of the scene's box, for "forward".
        temperature: None = the worst are the hard ones; (first, last) = they are drawn, with probability proportional
            to exp(-PSNR / temperature), which goes from first to last over training.
        start, max_error_quantile, seed: as `HardSamples`.
    Raises:
        LaminaError: a number out of range; (at the call) a batch that does not say whose view it is, or a pool smaller
            than an epoch's share.
    Source: Fang et al., Progressive Volume Distillation with Active Learning (2023), arXiv 2304.04012.
    """

    epoch: Tensor
    seen_id: Tensor
    seen: Tensor
    seen_centre: Tensor
    new_id: Tensor
    new_centre: Tensor
    new_frame: Tensor

    def __init__(
        self,
        ratio: float = 0.1,
        capacity: int = 100,
        *,
        jitter: float = math.pi / 20,
        from_epoch: int = 3,
        facing: Literal["object", "forward"] = "object",
        bound: float = 1.0,
        temperature: tuple[float, float] | None = None,
        start: float = 0.0,
        max_error_quantile: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(capacity, ratio, start=start, max_error_quantile=max_error_quantile, seed=seed)
        if not 0 <= jitter <= math.pi or from_epoch < 0 or not bound > 0:
            raise LaminaError(
                f"hard views need a jitter in 0..pi, from_epoch at least 0 and a bound above 0, got {jitter}, "
                f"{from_epoch} and {bound}"
            )
        if facing not in ("object", "forward"):
            raise LaminaError(f"facing must be 'object' or 'forward', got {facing!r}")
        if temperature is not None and not min(temperature) > 0:
            raise LaminaError(f"temperature must be two numbers above 0, first and last, got {tuple(temperature)}")
        self.jitter, self.from_epoch, self.facing, self.bound = jitter, from_epoch, facing, float(bound)
        self.temperature = temperature
        self.register_buffer("epoch", torch.full((), -1, dtype=torch.int64))
        self._forget_epoch()

    @property
    def replaced(self) -> tuple[int, ...]:
        """The `pose_id` of the cameras that are replaced in this epoch."""
        return tuple(self.new_id.tolist())

    @torch.no_grad()
    def propose(self, batch: Batch) -> dict[str, Any]:
        """Return the batch with the rays of replaced cameras moved."""
        ids, epoch = _whose(batch)
        if epoch != int(self.epoch):
            self._begin(epoch)
        origins, directions = batch["origins"], batch["directions"]
        mine = ids[:, None] == self.new_id
        for number in mine.any(0).nonzero().flatten().tolist():
            rows = mine[:, number, None]
            # Out of the frame of the camera whose rays these are, into that of the new one.
            turn = (self.new_frame[number] @ frame_of(directions[rows[:, 0]].sum(0)).T).to(directions)
            directions = torch.where(rows, torch.nn.functional.normalize(directions @ turn.T, dim=1), directions)
            origins = torch.where(rows, self.new_centre[number].to(origins), origins)
        return {**batch, "origins": origins, "directions": directions}

    @torch.no_grad()
    def observe(self, batch: Batch, errors: Tensor) -> None:
        """Add the rays of a batch to what is known of their cameras.

        Args:
            batch: that `propose` returned, and whatever others added to it.
            errors: (N,), the square error of each ray, a mean over colours.
        """
        ids, _ = _whose(batch)
        check_errors(errors, len(ids), type(self).__name__)
        if self.fraction < self.start:
            return
        kept = ids >= 0
        told = torch.cat([torch.stack([errors.detach(), torch.ones_like(errors)], 1), batch["directions"]], 1)[kept]
        self.seen_id, place = torch.cat([self.seen_id, ids[kept]]).unique(return_inverse=True)
        self.seen = self.seen.new_zeros(len(self.seen_id), 5).index_add(0, place, torch.cat([self.seen, told.float()]))
        # All rays of a camera begin at one place: whichever is written last.
        centres = self.seen_centre.new_zeros(len(self.seen_id), 3)
        centres[place] = torch.cat([self.seen_centre, batch["origins"][kept].to(self.seen_centre)])
        self.seen_centre = centres

    def _begin(self, epoch: int) -> None:
        """Rank the cameras of the epoch that ended, and say which of the new one are replaced."""
        ids, errors, centres = self.seen_id, self.seen[:, 0] / self.seen[:, 1], self.seen_centre
        sums, self.epoch = self.seen[:, 2:], torch.full_like(self.epoch, epoch)
        self._forget_epoch()
        if not len(ids):
            return
        count = self._share(len(ids))
        chosen = hardest(self._scores(errors), count, self.max_error_quantile)
        frames = [frame_of(s) for s in sums[chosen]]
        hard = {"centre": centres[chosen], "frame": torch.stack(frames) if frames else sums.new_zeros(0, 3, 3)}
        if not self.full:
            self._append(hard)
        elif epoch > self.from_epoch:
            slots = self._draw(count).to(ids.device)
            random = self._random()
            centre, frame = self.pool["centre"][slots], self.pool["frame"][slots]
            turns = [turned(*random.uniform(-self.jitter, self.jitter, 3)) for _ in slots]
            self.new_frame = torch.stack(turns).to(frame) @ frame
            self.new_centre = self._centres(random, len(slots)).to(centre) if self.facing == "forward" else centre
            drawn = random.choice(len(ids), len(slots), replace=False)
            self.new_id = ids[torch.from_numpy(drawn).to(ids.device)]
            self._write(slots[: len(chosen)], hard)

    def _scores(self, errors: Tensor) -> Tensor:
        """Return what is largest for the hard ones: the errors, or perturbed logits of a draw without repetition."""
        if self.temperature is None:
            return errors
        first, last = self.temperature
        psnr = -10 * errors.clamp(min=1e-10).log10()
        noise = torch.from_numpy(self._random().gumbel(size=len(errors))).to(errors)
        # The published constant, 50 - PSNR, falls out.
        return -psnr / (first + (last - first) * self.fraction) + noise

    def _centres(self, random: np.random.Generator, count: int) -> Tensor:
        pool = self.pool["centre"].double().cpu()
        low, high = pool.amin(0), pool.amax(0)
        margin, box = 0.05 * (high - low), torch.full((3,), self.bound, dtype=torch.float64)
        low = torch.maximum(low - margin, torch.minimum(low, -box))
        high = torch.minimum(high + margin, torch.maximum(high, box))
        return low + (high - low) * torch.from_numpy(random.random((count, 3)))

    def _forget_epoch(self) -> None:
        """Clear what belongs to one epoch: what was seen of its cameras, and which are replaced."""
        like = self.filled
        self.register_buffer("seen_id", torch.zeros(0, dtype=torch.int64, device=like.device))
        # Sum of errors, number of rays, sum of directions.
        self.register_buffer("seen", torch.zeros(0, 5, device=like.device))
        self.register_buffer("seen_centre", torch.zeros(0, 3, device=like.device))
        self.register_buffer("new_id", torch.zeros(0, dtype=torch.int64, device=like.device))
        self.register_buffer("new_centre", torch.zeros(0, 3, device=like.device))
        self.register_buffer("new_frame", torch.zeros(0, 3, 3, device=like.device))


def frame_of(direction: Tensor) -> Tensor:
    """Return the frame of a camera that looks along `direction` (3,), of any length: columns right, up, back; z up."""
    back = -torch.nn.functional.normalize(direction.float(), dim=0, eps=1e-12)
    up = back.new_tensor([0.0, 0.0, 1.0] if abs(float(back[2])) < 1 - 1e-6 else [0.0, 1.0, 0.0])
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=0)
    return torch.stack([right, torch.linalg.cross(back, right), back], dim=1)


def turned(yaw: float, pitch: float, roll: float) -> Tensor:
    """Return the rotation Rz(yaw) Ry(pitch) Rx(roll), (3, 3), angles in radians."""
    (cz, sz), (cy, sy), (cx, sx) = ((math.cos(a), math.sin(a)) for a in (yaw, pitch, roll))
    about_z = torch.tensor([[cz, -sz, 0.0], [sz, cz, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    about_y = torch.tensor([[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]], dtype=torch.float64)
    about_x = torch.tensor([[1.0, 0.0, 0.0], [0.0, cx, -sx], [0.0, sx, cx]], dtype=torch.float64)
    return about_z @ about_y @ about_x


def _whose(batch: Batch) -> tuple[Tensor, int]:
    """Return the number of each row's camera, and the epoch."""
    ids, epoch = batch.get("pose_id"), batch.get("epoch")
    if ids is None or epoch is None or "origins" not in batch:
        raise LaminaError(
            f"hard_views needs rays of numbered views: 'origins', 'directions', 'pose_id' and 'epoch' in the batch, as "
            f"the data set `scenes` draws them; it has {sorted(batch)}"
        )
    # The first row: others may have added rows of no epoch behind.
    return ids, int(epoch.flatten()[0]) if isinstance(epoch, Tensor) else int(epoch)
