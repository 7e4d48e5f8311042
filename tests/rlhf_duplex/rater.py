"""A judge for tests: it gives every field its second highest number, and keeps what it was asked."""

import json

from experiments.judge.server import Handler


class Rater(Handler):
    """`server.asked` is a list that the test gives it."""

    def answer(self, request, number):
        schema = request["response_format"]["json_schema"]["schema"]["properties"]
        answer = {name: "because" if "enum" not in form else form["enum"][-2] for name, form in schema.items()}
        message = {"role": "assistant", "content": json.dumps(answer)}
        self.server.asked.append(request["messages"][-1]["content"])
        self.send(200, {"choices": [{"message": message}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
