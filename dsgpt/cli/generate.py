"""`dsgpt generate MODEL --prompt TEXT`: continue a prompt."""

from __future__ import annotations

import click


@click.command()
@click.argument("model")
@click.option("--prompt", required=True, help="Text to continue; '' starts from nothing.")
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 = most likely token.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(0), help="0 = all tokens.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--trust-checkpoint", is_flag=True, help="Read pytorch_model.bin too, which may execute code.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    trust_checkpoint: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT with MODEL: a run folder (RUN@STEP), a checkpoint, or a Hugging Face folder."""
    from dsgpt.checkpoint.weights import find_model, load_model
    from dsgpt.cli.common import print_json
    from dsgpt.generate import Sampling, generate_text
    from dsgpt.tokenizer import Tokenizer

    location = find_model(model)
    network, tokenizer = load_model(location, trust=trust_checkpoint), Tokenizer.load(location.tokenizer)
    sampling = Sampling(max_new_tokens, temperature, top_k, seed)
    text, num_tokens = generate_text(network, tokenizer, prompt, sampling)
    if as_json:
        print_json({"model": str(location.path), "prompt": prompt, "text": text, "tokens": num_tokens})
    else:
        click.echo(prompt + text)
