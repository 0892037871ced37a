"""Continuous batching in pure Python: requests, pages, policies and plans. Never imports JAX; runs anywhere."""

from jaxllm.scheduling.loop import EngineLoop, Executor
from jaxllm.scheduling.plan import StepOutput, StepPlan
from jaxllm.scheduling.policy import (
    POLICIES,
    Budget,
    EngineInfo,
    Policy,
    PriorityPolicy,
    StepReport,
    Traits,
    View,
    make_policy,
)
from jaxllm.scheduling.request import FinishReason, Request, State
from jaxllm.scheduling.scheduler import RequestTooLong, Scheduler, SchedulerConfig

__all__ = [
    "POLICIES",
    "Budget",
    "EngineInfo",
    "EngineLoop",
    "Executor",
    "FinishReason",
    "Policy",
    "PriorityPolicy",
    "Request",
    "RequestTooLong",
    "Scheduler",
    "SchedulerConfig",
    "State",
    "StepOutput",
    "StepPlan",
    "StepReport",
    "Traits",
    "View",
    "make_policy",
]
