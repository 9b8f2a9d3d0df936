"""What all tests share: one thread, so that sums are formed in one order on every machine."""

import torch

torch.set_num_threads(1)
