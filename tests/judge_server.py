"""A judge on loopback that replies as a test says: text, a status, broken or cut bytes."""

import contextlib
import dataclasses
import http.server
import json
import threading

import jax

import zephyr_jax as zj
from zephyr_jax.weights.checkpoint import Model, save_model


def save_small_model(world, folder):
    """A random model of one layer with the little world's tokenizer, as it lies in the folder."""
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=400, num_hidden_layers=1)
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    model = Model(cfg, zj.init_params(cfg, jax.random.key(0)), tok, {})
    save_model(model, folder)
    return model


class Cut(bytes):
    """The first half of a body, after which the connection closes."""


def completion(text, logprobs=None):
    """A chat completion in OpenAI's form; `logprobs` are those of the first token."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    if logprobs:
        tops = [{"token": t, "logprob": x, "bytes": None} for t, x in logprobs.items()]
        choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return whole | {"choices": [choice], "usage": usage}


@contextlib.contextmanager
def judge_server(reply):
    """Its URL, and the requests so far; `reply(request, number)` gives what is sent back.

    That is a text, a dict or bytes (the whole body), a status, a status with headers, or a Cut.
    """
    asked, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request["key"] = self.headers["Authorization"]
            with lock:
                asked.append(request)
                number = len(asked)
            sent = reply(request, number)
            status, headers = (sent, {}) if isinstance(sent, int) else (200, {})
            if isinstance(sent, tuple):
                status, headers = sent
            body = completion(sent) if isinstance(sent, str) else sent
            if status != 200:
                body = {"error": {"message": f"no: {request['key']}", "type": "x"}}
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data) + 100 * isinstance(body, Cut)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that hangs up is no news
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
