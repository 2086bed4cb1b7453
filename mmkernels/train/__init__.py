# SPDX-License-Identifier: Apache-2.0
"""Training of the reference MM-LLM: data, stages, checkpoints, evaluation."""
