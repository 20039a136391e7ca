"""Verifiable rewards, computed in worker processes that can be killed."""

from sgpo.rewards.pool import RewardItem, RewardPool
from sgpo.rewards.registry import load_reward

__all__ = ["RewardItem", "RewardPool", "load_reward"]
