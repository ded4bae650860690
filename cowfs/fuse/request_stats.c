/* Counts the requests of each kind, and measures how long they take.
 *
 * A request is timed from when libfuse gets it until libfuse sends the reply. This excludes the transfer between kernel
 * and daemon, and the wait while another request is handled. It costs two readings of the clock and about ten memory
 * accesses.
 *
 * Requests that wait may be answered by another thread, so all requests in progress are in a table by their number.
 * With several threads, everything here runs under the core lock (core_lock.c).
 *
 * Durations are counted in ranges, four for each power of two, so they are exact to one eighth.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "request_stats.h"

#include "clock.h"
#include "held_data.h"
#include "last_change.h"
#include "messages.h"

enum {
	OPERATIONS = 64, /* opcodes; higher ones are counted as 0 */
	RANGES = 4 * 42, /* of durations: up to an hour */
	BUCKETS = 256,
	AT_HAND = 64, /* requests in progress for which no memory is allocated */
};

struct record { /* the figures of an operation */
	uint64_t count, errors, ns;
	uint64_t ranges[RANGES];
};

struct request { /* a request in progress */
	uint64_t unique;
	int64_t begun;
	uint32_t operation;
	uint32_t uid, held; /* held: bytes of the user's data in memory */
	bool own;           /* was allocated */
	struct request *next;
};

static struct record records[OPERATIONS];
static struct request *under_way[BUCKETS]; /* by unique */
static struct request at_hand[AT_HAND], *unused;
static uint64_t direct_reads;

static unsigned range_of(uint64_t ns)
{
	if (ns < 4)
		return (unsigned)ns;
	unsigned power = 63 - (unsigned)__builtin_clzll(ns);
	unsigned range = (power - 1) * 4 + (ns >> (power - 2) & 3);
	return range < RANGES ? range : RANGES - 1;
}

/* The shortest duration of a range. */
static uint64_t from(unsigned range)
{
	return range < 4 ? range : (uint64_t)(4 + range % 4) << (range / 4 - 1);
}

static struct request **bucket_of(uint64_t unique)
{
	return &under_way[unique / 2 % BUCKETS]; /* the kernel's numbers are even */
}

void request_stats_begin(const void *request, size_t size)
{
	struct in_header head;

	if (size < sizeof head)
		return;
	memcpy(&head, request, sizeof head);
	uint32_t operation = head.opcode < OPERATIONS ? head.opcode : 0;
	if (operation == FUSE_FORGET || operation == FUSE_BATCH_FORGET || operation == FUSE_INTERRUPT) {
		/* Nobody waits for an answer. */
		records[operation].count++;
		return;
	}
	struct request *r = unused;
	if (r)
		unused = r->next;
	else if ((r = malloc(sizeof *r)))
		r->own = true;
	else
		return; /* no memory: it is not counted */
	struct request **bucket = bucket_of(head.unique);
	r->unique = head.unique;
	r->operation = operation;
	r->uid = head.uid;
	r->held = held_data_take(request, size);
	r->next = *bucket;
	*bucket = r;
	r->begun = monotonic_ns();
	last_change_request(head.pid, (uint64_t)r->begun);
}

void request_stats_end(uint64_t unique, int32_t error)
{
	struct request **place = bucket_of(unique), *r;

	if (!unique) /* a notice to the kernel, from any thread */
		return;
	while ((r = *place) && r->unique != unique)
		place = &r->next;
	if (!r)
		return;
	int64_t took = monotonic_ns() - r->begun;
	struct record *record = &records[r->operation];
	record->count++;
	record->errors += error != 0 && error != -ENOSYS; /* ENOSYS only means: do not send this again */
	record->ns += (uint64_t)took;
	record->ranges[range_of((uint64_t)took)]++;
	held_data_give_back(r->uid, r->held);
	*place = r->next;
	if (r->own) {
		free(r);
	} else {
		r->next = unused;
		unused = r;
	}
}

void request_stats_read_directly(void)
{
	direct_reads++;
}

void request_stats_reset(void)
{
	for (unsigned b = 0; b < BUCKETS; b++)
		for (struct request *r = under_way[b], *next; r; r = next) {
			next = r->next;
			if (r->own)
				free(r);
		}
	memset(under_way, 0, sizeof under_way);
	memset(records, 0, sizeof records);
	direct_reads = 0;
	unused = NULL;
	for (unsigned i = 0; i < AT_HAND; i++) {
		at_hand[i].next = unused;
		unused = &at_hand[i];
	}
}

/* --- for Python --- */

/* Append *item* and drop the reference to it; -1 if this fails. */
static int add(PyObject *list, PyObject *item)
{
	int failure = item ? PyList_Append(list, item) : -1;

	Py_XDECREF(item);
	return failure;
}

static PyObject *ranges(const struct record *record)
{
	PyObject *list = PyList_New(0);

	for (unsigned i = 0; list && i < RANGES; i++)
		if (record->ranges[i] &&
		    add(list, Py_BuildValue("(KKK)", (unsigned long long)from(i), (unsigned long long)from(i + 1),
					    (unsigned long long)record->ranges[i])))
			Py_CLEAR(list);
	return list;
}

static PyObject *py_figures(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	PyObject *known = PyList_New(0), *waiting = PyList_New(0);
	int64_t time = monotonic_ns();

	for (unsigned i = 0; known && i < OPERATIONS; i++) {
		const struct record *r = &records[i];
		if (r->count &&
		    add(known, Py_BuildValue("(IKKKN)", i, (unsigned long long)r->count, (unsigned long long)r->errors,
					     (unsigned long long)r->ns, ranges(r))))
			Py_CLEAR(known);
	}
	for (unsigned b = 0; waiting && b < BUCKETS; b++)
		for (const struct request *r = under_way[b]; waiting && r; r = r->next)
			if (add(waiting, Py_BuildValue("(IL)", r->operation, (long long)(time - r->begun))))
				Py_CLEAR(waiting);
	if (!known || !waiting) {
		Py_XDECREF(known);
		Py_XDECREF(waiting);
		return NULL;
	}
	return Py_BuildValue("(NNK)", known, waiting, (unsigned long long)direct_reads);
}

PyMethodDef request_stats_methods[] = {
	{ "figures", py_figures, METH_NOARGS,
	  "figures(): (opcode, count, errors, ns, ranges) of each operation, where a range is (from, to, count) of\n"
	  "durations in ns; (opcode, ns) of each request in progress; the number of reads served without Python." },
	{ NULL, NULL, 0, NULL },
};
