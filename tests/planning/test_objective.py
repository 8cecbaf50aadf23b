from __future__ import annotations

import numpy as np
import pytest
import torch

from cola_dist.planning.domains import open_domain
from cola_dist.planning.objective import Objective, SuccessClassifier, train_classifier


def test_reward_by_hand() -> None:
    goal = torch.zeros(3, 64, 64, dtype=torch.uint8)
    frames = torch.zeros(2, 3, 3, 64, 64, dtype=torch.uint8)
    frames[1, 2, 0, :2, :5] = 255
    assert Objective(goal)(frames).tolist() == pytest.approx([0.0, -0.5 * 10])


def test_pictures_of_any_size_are_judged_alike() -> None:
    goal = torch.zeros(3, 64, 64, dtype=torch.uint8)
    goal[:, :32] = 255
    frames = torch.zeros(1, 4, 3, 64, 64, dtype=torch.uint8)
    assert Objective(goal)(frames) == Objective(goal)(frames[..., ::2, ::2]) == -0.5 * 4 * 3 * 32 * 64


def test_the_classifier_adds_ten_times_its_logits() -> None:
    frames = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = SuccessClassifier(32).eval()
    plain, judged = Objective(frames[0, 0])(frames), Objective(frames[0, 0], model)(frames)
    torch.testing.assert_close(judged - plain, 10 * model(frames.flatten(0, 1)).reshape(2, 3).sum(1), atol=1e-2, rtol=1e-3)


def test_a_classifier_learns_to_see_the_corner() -> None:
    frames, done = open_domain("square", "corner").labelled(300, seed=0)
    _, accuracy = train_classifier(frames, done, 32, seed=0, steps=80)
    assert accuracy > 0.9
    model, again = (train_classifier(frames, done, 32, seed=0, steps=3)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert np.array_equal(done[:4], [True, False, True, False])
