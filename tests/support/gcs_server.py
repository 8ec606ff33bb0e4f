"""Serves Google Cloud Storage's JSON API on this machine, as much of it as a run in a bucket uses.

    python tests/support/gcs_server.py --port=9000 BUCKET...

Objects live in memory. Each has a generation, and requests obey conditions on it as the service
documents them: https://cloud.google.com/storage/docs/json_api/v1/objects. The server knows no
credentials but --token, and no folders, versions or access lists. With --unreliable it is as a
service may be: it answers some requests with 503, half of those only after it has done what they
ask, and lets a few wait for --stall seconds.

It is written by hand because no package on PyPI will do. gcp-storage-emulator 2026.7.19 obeys
neither the conditions (the second of two writers wins) nor the bounds of a listing (deleting a
range deletes all). Google's storage-testbench 0.45, which is not on PyPI, gave TensorStore and
Orbax the same answers as this server.
"""

import argparse
import base64
import email
import hashlib
import http
import http.server
import itertools
import json
import random
import re
import sys
import threading
import time
import urllib.parse
from typing import NamedTuple

import google_crc32c


class Object(NamedTuple):
    generation: int
    data: bytes
    about: dict  # contentType, metadata and so on, as the client gave them


class Refused(Exception):
    """An answer that is an error; `status` is the HTTP status."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason


class Buckets:
    """The objects. A `query` holds the parameters of a request, its conditions included."""

    def __init__(self, names):
        self._buckets: dict[str, dict[str, Object]] = {name: {} for name in names}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._lock = threading.Lock()

    def bucket(self, name: str) -> dict[str, Object]:
        if name not in self._buckets:
            raise Refused(404, f'The specified bucket does not exist: {name}')
        return self._buckets[name]

    def get(self, bucket: str, name: str, query: dict) -> Object:
        found = self.bucket(bucket).get(name)
        if found is None:
            raise Refused(404, f'No such object: {bucket}/{name}')
        _check(found.generation, query)
        if int(query.get('generation', found.generation)) != found.generation:
            raise Refused(404, f'No such generation of {bucket}/{name}')
        return found

    def put(self, bucket: str, name: str, data: bytes, about: dict, query: dict) -> Object:
        with self._lock:
            objects = self.bucket(bucket)
            _check(objects[name].generation if name in objects else 0, query)
            objects[name] = Object(next(self._generations), data, about)
            return objects[name]

    def delete(self, bucket: str, name: str, query: dict) -> None:
        with self._lock:
            self.get(bucket, name, query)
            del self.bucket(bucket)[name]

    def list(self, bucket: str, query: dict) -> tuple[dict[str, Object], list[str]]:
        """Returns (objects by name, the prefixes that others share up to the delimiter)."""
        objects, prefixes = {}, set()
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
        for name, found in sorted(self.bucket(bucket).items()):
            if not name.startswith(prefix) or name < query.get('startOffset', ''):
                continue
            if 'endOffset' in query and name >= query['endOffset']:
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ('', '', '')
            if cut:
                prefixes.add(prefix + head + cut)
            else:
                objects[name] = found
        return objects, sorted(prefixes)


def _check(generation: int, query: dict) -> None:
    if int(query.get('ifGenerationMatch', generation)) != generation:
        raise Refused(412, 'At least one of the pre-conditions you specified did not hold.')
    if int(query.get('ifGenerationNotMatch', -1)) == generation:
        raise Refused(304, '')


def resource(bucket: str, name: str, found: Object) -> dict:
    checksum = google_crc32c.Checksum(found.data).digest()
    return found.about | {
        'kind': 'storage#object',
        'bucket': bucket,
        'name': name,
        'generation': str(found.generation),
        'metageneration': '1',
        'size': str(len(found.data)),
        'updated': '2026-01-01T00:00:00.000Z',
        'timeCreated': '2026-01-01T00:00:00.000Z',
        'storageClass': 'STANDARD',
        'etag': str(found.generation),
        'crc32c': base64.b64encode(checksum).decode(),
        'md5Hash': base64.b64encode(hashlib.md5(found.data).digest()).decode(),
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = 'HTTP/1.1', -1  # buffered: one packet an answer
    buckets: Buckets
    fails = False
    # Resumable uploads by id: (bucket, name, about, query, the bytes so far).
    uploads: dict[str, tuple]

    def handle_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        if self.server.dice.random() < self.server.unreliable / 50:
            time.sleep(self.server.stall)
        luck = self.server.dice.random()
        if luck < self.server.unreliable / 2:
            self._send(503)
            return
        self.fails = luck < self.server.unreliable  # after it has done what is asked
        try:
            given = self.headers.get('Authorization')
            if self.server.authorization not in (None, given):
                raise Refused(401, 'Anonymous caller does not have access to the bucket.')
            if url.path.startswith('/batch/'):
                self._batch(body)
                return
            match = re.fullmatch(r'(?:/\w+)?/storage/v1/b/([^/]+)(?:(/o)(?:/(.*))?)?', url.path)
            if not match:
                raise Refused(501, f'{self.command} {url.path} is not known here')
            bucket, name = match[1], match[3] and urllib.parse.unquote(match[3])
            if url.path.startswith('/upload/'):
                self._upload(bucket, query, body)
            elif not match[2]:
                self.buckets.bucket(bucket)
                self._answer({'kind': 'storage#bucket', 'name': bucket, 'location': 'HERE'})
            elif not name:
                objects, prefixes = self.buckets.list(bucket, query)
                items = [resource(bucket, *item) for item in objects.items()]
                self._answer({'kind': 'storage#objects', 'items': items, 'prefixes': prefixes})
            else:
                self._object(bucket, name, query)
        except Refused as refused:
            error = {'code': refused.status, 'message': refused.reason}
            self._send(refused.status, json.dumps({'error': error}).encode())

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def _object(self, bucket: str, name: str, query: dict) -> None:
        if self.command == 'DELETE':
            self.buckets.delete(bucket, name, query)
            self._send(204)
        elif self.command == 'POST':
            source, _, target = name.partition('/rewriteTo/b/')
            found = self.buckets.get(bucket, source, {})
            to_bucket, _, to_name = target.partition('/o/')
            copy = self.buckets.put(to_bucket, to_name, found.data, found.about, query)
            self._answer({'done': True, 'resource': resource(to_bucket, to_name, copy)})
        elif query.get('alt') == 'media':
            self._send_part(self.buckets.get(bucket, name, query))
        else:
            self._answer(resource(bucket, name, self.buckets.get(bucket, name, query)))

    def _send_part(self, found: Object) -> None:
        headers = {'x-goog-generation': str(found.generation), 'x-goog-metageneration': '1'}
        size = len(found.data)
        if not (wanted := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))):
            self._send(200, found.data, **headers)
            return
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        stop = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
        if start >= size:
            raise Refused(416, 'The requested range cannot be satisfied.')
        headers['Content-Range'] = f'bytes {start}-{stop - 1}/{size}'
        self._send(206, found.data[start:stop], **headers)

    def _upload(self, bucket: str, query: dict, body: bytes) -> None:
        if 'upload_id' in query:
            self._go_on(query['upload_id'], body)
        elif query['uploadType'] == 'media':
            about = {'contentType': self.headers.get('Content-Type', '')}
            found = self.buckets.put(bucket, query['name'], body, about, query)
            self._answer(resource(bucket, query['name'], found))
        elif query['uploadType'] == 'multipart':
            about, data = self._parts(body)
            found = self.buckets.put(bucket, about['name'], data, about, query)
            self._answer(resource(bucket, about['name'], found))
        else:
            about = json.loads(body or b'{}')
            name, upload_id = query.get('name') or about['name'], str(len(self.uploads))
            self.uploads[upload_id] = bucket, name, about, query, bytearray()
            where = f'http://{self.headers["Host"]}{self.path}&upload_id={upload_id}'
            self._send(200, Location=where)

    def _go_on(self, upload_id: str, body: bytes) -> None:
        *target, data = self.uploads[upload_id]
        bucket, name, about, query = target
        data += body
        whole = self.headers.get('Content-Range', '').rpartition('/')[2]
        if whole == '*' or (whole and int(whole) > len(data)):
            self._send(308, Range=f'bytes=0-{len(data) - 1}')
            return
        found = self.buckets.put(bucket, name, bytes(data), about, query)
        self._answer(resource(bucket, name, found))

    def _parts(self, body: bytes) -> tuple[dict, bytes]:
        boundary = re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
        _, about, data, _ = body.split(b'--' + boundary)
        about, data = (re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1] for part in (about, data))
        return json.loads(about), re.sub(rb'\r?\n\Z', b'', data)

    def _batch(self, body: bytes) -> None:
        """Answers a batch of deletions; gcsfs sends nothing else in batches."""
        head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
        answers = []
        for part in email.message_from_bytes(head + body).get_payload():
            line = part.get_payload().split('\n')[0]
            path = re.search(r'DELETE \S*/b/([^/]+)/o/([^? ]+)', line)
            try:
                self.buckets.delete(path[1], urllib.parse.unquote(path[2]), {})
                answer = '204 No Content'
            except Refused as refused:
                answer = f'{refused.status} {refused.reason}'
            answers.append(
                f'--answers\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {answer}\r\n\r\n\r\n'
            )
        text = ''.join(answers) + '--answers--\r\n'
        self._send(200, text.encode(), **{'Content-Type': 'multipart/mixed; boundary=answers'})

    def _body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _answer(self, document: dict) -> None:
        self._send(200, json.dumps(document).encode(), **{'Content-Type': 'application/json'})

    def _send(self, status: int, body: bytes = b'', **headers: str) -> None:
        if self.fails:
            status, body, headers = 503, b'', {}
        self.send_response(status, http.HTTPStatus(status).phrase)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def log_request(self, code='-', size='-') -> None:
        if self.server.verbose:
            print(self.command, self.path[:300], int(code), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--port', type=int, default=0)
    parser.add_argument(
        '--token', help='token that requests must have; without it, none is checked'
    )
    parser.add_argument('--verbose', action='store_true')
    parser.add_argument('--unreliable', type=float, default=0.0, help='the share of 503s')
    parser.add_argument('--stall', type=float, default=5.0, help='seconds')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('buckets', nargs='+')
    flags = parser.parse_args()
    Handler.buckets, Handler.uploads = Buckets(flags.buckets), {}
    server = http.server.ThreadingHTTPServer(('127.0.0.1', flags.port), Handler)
    server.verbose = flags.verbose
    server.unreliable, server.stall = flags.unreliable, flags.stall
    server.dice = random.Random(flags.seed)
    server.authorization = flags.token and f'Bearer {flags.token}'
    print(f'http://127.0.0.1:{server.server_port}', flush=True)  # tells the parent that it listens
    server.serve_forever()


if __name__ == '__main__':
    main()
