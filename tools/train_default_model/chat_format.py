"""The special tokens and the form of a conversation, the same in the corpus and in the template."""

BEGIN, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def exchange_text(question: str, answer: str) -> str:
    """One question and answer as the template writes them, without begin and last end."""
    return f"{USER}{question}{END}{ASSISTANT}{answer}"
