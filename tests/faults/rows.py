"""All rows, in the order of docs/reliability.md."""

from tests.faults.data import ROWS as DATA
from tests.faults.disk import ROWS as DISK
from tests.faults.machines import ROWS as MACHINES
from tests.faults.malice import ROWS as MALICE
from tests.faults.processes import ROWS as PROCESSES
from tests.faults.remote import ROWS as REMOTE
from tests.faults.segment import ROWS as SEGMENT
from tests.faults.shards import ROWS as SHARDS
from tests.faults.soak import ROWS as SOAK

ROWS = (*PROCESSES, *MACHINES, *DISK, *DATA, *MALICE, *SEGMENT, *SHARDS, *REMOTE, *SOAK)
