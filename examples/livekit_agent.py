"""A LiveKit agent with a face, which chooses its emotions by itself.

    pip install 'flowvqtalker[livekit]'
    export LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=... PORTRAIT=portrait.jpg
    python examples/livekit_agent.py dev

The models' names go through LiveKit's own service; for others, see LiveKit's plugins. The portrait needs none of them.
"""

from __future__ import annotations

import asyncio
import os

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, JobProcess, cli, function_tool

from flowvqtalker import Talker
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.integrations.livekit import AvatarSession
from flowvqtalker.live import LiveTalker


class Assistant(Agent):
    """Shows what it feels before it speaks."""

    def __init__(self, face: AvatarSession) -> None:
        super().__init__(
            instructions="You are a friendly assistant who talks with the user; answer in a few spoken sentences. "
            f"Before each answer call show_emotion with the feeling that fits it: {', '.join(EMOTIONS)}."
        )
        self._face = face

    @function_tool
    async def show_emotion(self, emotion: str) -> str:
        """Show an emotion in your face while you say what comes next."""
        try:
            self._face.set_emotion(emotion)
        except UserError as error:
            return str(error)
        return "shown"


server = AgentServer()


def load(process: JobProcess) -> None:
    """Load the weights before a job comes."""
    process.userdata["talker"] = Talker.from_pretrained(components=LiveTalker.COMPONENTS)


server.setup_fnc = load


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    """One conversation."""
    await ctx.connect()
    live = await asyncio.to_thread(LiveTalker, ctx.proc.userdata["talker"], os.environ["PORTRAIT"])
    face = AvatarSession(live)
    session = AgentSession(stt="deepgram/nova-3", llm="openai/gpt-4.1-mini", tts="cartesia/sonic-3")
    await face.start(session, ctx.room)
    await session.start(agent=Assistant(face), room=ctx.room)
    await session.generate_reply(instructions="Greet the user.")


if __name__ == "__main__":
    cli.run_app(server)
