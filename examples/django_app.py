"""Django in one file: an order and the run that confirms it are committed together, or neither is.

`DATABASE_URL=postgresql://… python examples/django_app.py [--port 8000]`
"""

from __future__ import annotations

import argparse
import json
import os
from wsgiref.simple_server import make_server

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import IntegrityError, connection, models, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from psycopg.conninfo import conninfo_to_dict

from queue_service import App

queue = App()
# Its tasks, blocking. With `conn=` it needs no connection of its own; to ask about runs it has to be open.
q = queue.sync

where = conninfo_to_dict(os.environ["DATABASE_URL"])
names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            **{name: where[key] for key, name in names.items() if key in where},
        }
    },
    ROOT_URLCONF=__name__,
)
django.setup()


@queue.task
def confirm(number: int, email: str) -> str:
    return f"order {number}: mail to {email}"


class Order(models.Model):
    number = models.IntegerField(primary_key=True)
    email = models.TextField()

    class Meta:
        """A model outside an app of Django's has to name one."""

        app_label = "shop"
        db_table = "orders"

    def __str__(self) -> str:
        return f"order {self.number}"


def order(request: HttpRequest) -> JsonResponse:
    new = json.loads(request.body)
    try:
        with transaction.atomic():
            run_id = q.enqueue("confirm", new, conn=connection)
            Order.objects.create(**new)
    except IntegrityError:
        return JsonResponse({"error": "There is an order of this number."}, status=409)
    return JsonResponse({"run": run_id}, status=201)


def run(_: HttpRequest, run_id: int) -> JsonResponse:
    found = q.get(run_id)
    if found is None:
        return JsonResponse({}, status=404)
    return JsonResponse({"task": found.task, "state": found.state, "payload": dict(found.payload)})


urlpatterns = [path("orders", order), path("runs/<int:run_id>", run)]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Orders, with Django.")
    parser.add_argument("--port", type=int, default=8000)
    if "orders" not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(Order)
    with make_server("127.0.0.1", parser.parse_args().port, get_wsgi_application()) as server, q:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
