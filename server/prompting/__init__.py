"""From a conversation to what the engine needs: the prompt's text, and the grammar of the answer."""
