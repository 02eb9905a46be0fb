"""A Pipecat agent with a face, in the browser.

    pip install 'flowvqtalker[pipecat,webrtc]' 'pipecat-ai[openai,runner]'
    export OPENAI_API_KEY=... PORTRAIT=portrait.jpg        # OPENAI_BASE_URL for a server of your own
    python examples/pipecat_agent.py                       # then open the address that it prints

The model starts its answers with an emotion in brackets, which the portrait shows while it says them.
"""

from __future__ import annotations

import asyncio
import os
import re
from functools import cache

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import Frame, LLMTextFrame, ServiceUpdateSettingsFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.workers.runner import WorkerRunner

from flowvqtalker import Talker
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.integrations.pipecat import FlowVQTalkerVideoService
from flowvqtalker.live import LiveTalker

PROMPT = (
    "You are a friendly assistant who talks with the user; answer in a few spoken sentences. "
    f"Start each answer with the feeling that fits it in brackets, such as [happy]: {', '.join(EMOTIONS)}."
)


class EmotionTags(FrameProcessor):
    """Takes ``[happy]`` out of the model's text and passes it to the portrait, in its place among the sentences."""

    def __init__(self) -> None:
        super().__init__()
        self._held = ""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Text comes in pieces: hold back an open bracket."""
        await super().process_frame(frame, direction)
        if not isinstance(frame, LLMTextFrame):
            if self._held and direction == FrameDirection.DOWNSTREAM:
                held, self._held = self._held, ""
                await self.push_frame(LLMTextFrame(held))
            await self.push_frame(frame, direction)
            return
        text = self._held + frame.text
        while found := re.search(r"\[(\w+)\]\s*", text):
            if found.start():
                await self.push_frame(LLMTextFrame(text[: found.start()]))
            settings = FlowVQTalkerVideoService.Settings(emotion=found[1].lower())
            await self.push_frame(ServiceUpdateSettingsFrame(delta=settings))
            text = text[found.end() :]
        text, bracket, rest = text.partition("[")
        self._held = bracket + rest
        if text:
            await self.push_frame(LLMTextFrame(text))


@cache
def talker() -> Talker:
    """The weights, loaded once."""
    return Talker.from_pretrained(components=LiveTalker.COMPONENTS)


def pipeline(transport: BaseTransport, face: FlowVQTalkerVideoService) -> Pipeline:
    """From the user's microphone to the portrait."""
    key, url = os.environ["OPENAI_API_KEY"], os.environ.get("OPENAI_BASE_URL")
    context = LLMContext([{"role": "system", "content": PROMPT}])
    user, assistant = LLMContextAggregatorPair(
        context, user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer())
    )
    return Pipeline(
        [
            transport.input(),
            OpenAISTTService(api_key=key, base_url=url),
            user,
            OpenAILLMService(api_key=key, base_url=url),
            EmotionTags(),
            OpenAITTSService(api_key=key, base_url=url),
            face,
            transport.output(),
            assistant,
        ]
    )


async def bot(arguments: RunnerArguments) -> None:
    """One conversation."""

    def params() -> TransportParams:
        return TransportParams(
            audio_in_enabled=True,
            audio_out_enabled=True,
            video_out_enabled=True,
            video_out_is_live=True,
            video_out_width=512,
            video_out_height=512,
            video_out_framerate=25,
        )

    transport = await create_transport(arguments, {"webrtc": params})
    live = await asyncio.to_thread(lambda: LiveTalker(talker(), os.environ["PORTRAIT"]))
    worker = PipelineWorker(pipeline(transport, FlowVQTalkerVideoService(live)))

    @transport.event_handler("on_client_disconnected")
    async def on_client_disconnected(transport: BaseTransport, client: object) -> None:
        await worker.cancel()

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
