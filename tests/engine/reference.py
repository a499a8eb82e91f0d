"""The meaning of the program as a plain loop: one process, one video, item by item in the order (tick, chunk, pass).

It shares the run and the stage with the engine, and nothing of how work is ordered, begun, waited for or handed out.
"""

from engine.executor import Stage
from engine.kv.layout import KVSettings
from engine.request import encode, prepare
from engine.reuse.policy import ReuseSettings


def reference_latents(pipeline, request, reuse=None, kv=None):
    """What the loop makes.

    Returns:
        Latents [1, C, t, h, w] of every chunk, the work items that were run, and the decisions by (tick, chunk).
    """
    reuse, kv = reuse or ReuseSettings(), kv or KVSettings()
    encoded = encode(pipeline, request)
    run, admission = prepare(pipeline, request, encoded, number=0, reuse=reuse, kv=kv, observe=True)
    stage = Stage(pipeline.model, pipeline.attention)
    stage.admit(admission)
    ran, made, decisions = [], [], {}

    def carry_out(work):
        ran.append(work.item)
        stage.change(work.item)
        return stage.velocity(work.item, stage.forward(work.item, stage.embed(work.x)))

    for work in run.prefix_work():
        carry_out(work)
    for tick in run.schedule:
        for work in run.begin(tick):
            carry_out(work)
        for seen, decision in run.decide(tick):
            decisions[tick.index, seen.chunk] = decision
            if decision.computes:
                passes = run.open(tick, seen.chunk, seen.step, decision)
                velocities = [carry_out(work) for work in passes]
                run.close(seen.chunk, seen.step, [work.item.what for work in passes], velocities)
        run.seal(tick)
        for chunk in tick.finishing:
            latents = run.finish(chunk)
            if latents.shape[2]:
                made.append(latents)
    return made, ran, decisions
