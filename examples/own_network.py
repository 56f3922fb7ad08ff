# SPDX-License-Identifier: Apache-2.0
"""A network of your own, trained on the paper's loss with this package's kernels, and sampled from.

python examples/own_network.py [STEPS]
"""

import sys

import torch

import berdiff_fast as bf

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
data = bf.data.phantom.generate(64, 32, seed=1)
images, raters = data.images, data.raters  # float32 (64, 1, 32, 32), bool (64, 4, 1, 32, 32)

network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3, padding=1),
    torch.nn.SiLU(),
    torch.nn.Conv2d(32, 32, 3, padding=2, dilation=2),
    torch.nn.SiLU(),
    torch.nn.Conv2d(32, 1, 3, padding=1),
)


def model(y_t, t, img):  # (N, 1, H, W) of 0.0 and 1.0, (N,) int64, (N, 1, H, W)
    time = (t.float() / 1000).view(-1, 1, 1, 1).expand_as(y_t)
    return network(torch.cat([y_t, img, time], dim=1))  # logits, (N, 1, H, W)


schedule = bf.NoiseSchedule("cosine2")
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
for step in range(steps):
    rows = torch.randint(len(images), (16,))
    y_0 = raters[rows, torch.randint(raters.shape[1], (16,))]  # one rater of each image
    t = torch.randint(schedule.timesteps, (16,))
    y_t = bf.ops.q_sample(y_0, t, bf.image_seeds(step, 16), schedule)  # q(y_t | y_0): BerDiff, eq. 2
    logits = model(y_t.float(), t, images[rows])
    loss = bf.ops.diffusion_loss(logits, y_t, y_0, t, schedule).mean()  # eq. 8, in bits per pixel
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: {loss.item():.3f} bits per pixel")

with torch.no_grad():
    masks = bf.sample(model, images[:2], n=16, steps=10, schedule=schedule, prediction="epsilon", seed=7)
ged = bf.metrics.generalized_energy_distance(raters[:2], masks)  # 0 is best
print(f"masks {tuple(masks.shape)}; generalised energy distance to the raters {ged.mean():.3f}")
