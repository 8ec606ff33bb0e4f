"""The agent that Harbor's trial has while an episode works in its environment."""

import asyncio
from typing import Any

try:
    from harbor.agents.base import BaseAgent
    from harbor.agents.capabilities import AgentCapabilities
except ModuleNotFoundError:  # Harbor is optional, and every module here can be imported without it
    BaseAgent, AgentCapabilities = object, dict


class EpisodeAgent(BaseAgent):
    """Hands the environment to whoever waits for `begun`, and waits for `may_end`."""

    # Harbor refuses tasks that ask for more than its agent has. It shall not, since the tasks' own
    # solutions need none of it; trial.py says what an episode lacks.
    capabilities = AgentCapabilities(
        skills=True, mcp_servers=True, mcp_http_headers=True, load_atif_trajectory=True
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.begun: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.may_end = asyncio.Event()
        self.oracle: Any = None  # Harbor's agent that solves the step before this one returns

    @staticmethod
    def name() -> str:
        return 'echo_jax'

    def version(self) -> str | None:
        return None

    async def setup(self, environment: Any) -> None:
        pass

    async def run(self, instruction: str, environment: Any, context: Any) -> None:
        """Harbor calls it once for every step of a task."""
        if not self.begun.done():
            self.begun.set_result(environment)
        await self.may_end.wait()
        if self.oracle is not None:
            await self.oracle.run(instruction, environment, context)

    load = run  # what Harbor calls instead if the task has a trajectory.json
