"""Object storage behind :mod:`cola_dist.storage`: URIs with options, one client for each endpoint and account, and patience.

``s3://BUCKET/KEY?endpoint=http://HOST:PORT&region=NAME&profile=NAME&anonymous=true``: all options may be left out. What is not given
comes from the environment: ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID`` and the rest of boto3's chain, down to
the role of the machine. Options begin after the last ``?``; a key that holds one itself is written with a ``?`` at its end.

What passes (429, 5xx and throttling, refused and reset connections, time-outs, answers that break off) is tried again, with pauses that grow
to a few seconds at random lengths, until the patience is used up: ``COLA_STORAGE_PATIENCE_S`` seconds (60) since the operation began or last
moved bytes; a request and the body of its answer have that long each. An endpoint that never answered this process gets 5 s at most, so that
a wrong one is told soon, unless the process knows that others have reached it. botocore's own retries are off unless ``AWS_MAX_ATTEMPTS`` is
set.
"""
