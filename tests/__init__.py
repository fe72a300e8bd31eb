"""Tests. Kernels in Triton run in its interpreter here, which has to be said before anything imports Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"
