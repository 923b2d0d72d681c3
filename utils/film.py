"""Film the policies of runs side by side, as an animated WebP or GIF.

    MUJOCO_GL=egl python utils/film.py RUN_DIR RUN_DIR --output policies.webp

Each acts by its mean in real time, from the start of its first evaluation episode, and begins again
when an episode ends.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from evaluate import load_actor, load_script
from PIL import Image


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # run folders, from left to right
    output: Path = Path("policies.webp")  # the file to write
    seconds: float = 5.0  # length of the film
    frames_per_second: int = 20
    size: int = 240  # pixels, width and height of each panel
    quality: int = 50  # of the pictures in a WebP, 0 to 100


def film(run_dir, args):
    """Return the frames of one policy, (frames, size, size, 3)."""
    script, run_args = load_script(run_dir)
    pixels = {"width": args.size, "height": args.size}
    env = script.make_env(run_args.env_id, render_mode="rgb_array", **pixels)
    actor = load_actor(run_dir, script, env, run_args)

    frames = []
    seconds = 0.0  # of simulated time
    obs, _ = env.reset(seed=1_000 * run_args.seed)
    count = round(args.seconds * args.frames_per_second)
    while len(frames) < count:
        while seconds >= len(frames) / args.frames_per_second:  # more than once if steps are long
            frames.append(env.render())
        action = actor.act(obs)
        mean = action[0] if isinstance(action, tuple) else action  # DDPG has no std
        obs, _, terminated, truncated, _ = env.step(mean)
        seconds += env.unwrapped.dt
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    return np.array(frames[:count])


def main(args):
    args.output.parent.mkdir(parents=True, exist_ok=True)
    panels = [film(run_dir, args) for run_dir in args.run_dirs]
    first, *others = [Image.fromarray(frame) for frame in np.concatenate(panels, axis=2)]
    milliseconds = round(1000 / args.frames_per_second)
    options = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    first.save(args.output, quality=args.quality, method=4, **options)  # half the default's size
    print(f"the film is in {args.output}")


if __name__ == "__main__":
    sys.path.insert(0, "")  # so that the run's --env-id my_module:MyTask-v0 finds my_module.py here
    warnings.filterwarnings("ignore", message=".*is out of date")  # papers use v4
    main(tyro.cli(Args, description=__doc__))
