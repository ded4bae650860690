/* Inodes that are known to have no security.capability.
 *
 * Before the first write to a file, and before each change of its owner, the kernel asks for this attribute, and keeps
 * no answer (cap_inode_need_killpriv() in security/commoncap.c). Hardly any file has it. So this answers GETXATTR for
 * those that have not, and Python need not run. The adapter says which they are.
 *
 * A hash table with open addressing. All of it happens under the core lock.
 */
#include "no_capability.h"

#include <stdlib.h>
#include <string.h>

enum { LEAST = 64 };       /* places */
#define REMOVED UINT64_MAX /* in the place of an inode that was removed; 0: the place is free */

static uint64_t *places;
static size_t count, live, taken; /* places; those with an inode; those that are not free */
static bool answers;

static size_t place_of(uint64_t inode, size_t of)
{
	return (size_t)(inode * UINT64_C(0x9E3779B97F4A7C15) >> 32) & (of - 1);
}

/* Where an inode is; NULL: nowhere. */
static uint64_t *find(uint64_t inode)
{
	if (!live || !inode || inode == REMOVED)
		return NULL;
	for (size_t i = place_of(inode, count); places[i]; i = (i + 1) & (count - 1))
		if (places[i] == inode)
			return &places[i];
	return NULL;
}

static void put(uint64_t *in, size_t of, uint64_t inode)
{
	size_t i = place_of(inode, of);

	while (in[i])
		i = (i + 1) & (of - 1);
	in[i] = inode;
}

/* Have as many places as the inodes need, and one more. False: there is no memory. */
static bool resize(void)
{
	size_t more = LEAST;

	while (more < 2 * (live + 1))
		more *= 2;
	uint64_t *fresh = calloc(more, sizeof *fresh);
	if (!fresh)
		return false;
	for (size_t i = 0; i < count; i++)
		if (places[i] && places[i] != REMOVED)
			put(fresh, more, places[i]);
	free(places);
	places = fresh;
	count = more;
	taken = live;
	return true;
}

static void clear(void)
{
	free(places);
	places = NULL;
	count = live = taken = 0;
}

void no_capability_reset(void)
{
	clear();
	answers = false;
}

bool no_capability_has(uint64_t inode, const char *name)
{
	return answers && !strcmp(name, "security.capability") && find(inode);
}

void no_capability_add(uint64_t inode)
{
	if (inode && inode != REMOVED && !find(inode) && ((taken + 1) * 4 <= count * 3 || resize())) {
		put(places, count, inode);
		live++;
		taken++;
	}
}

static PyObject *py_add(PyObject *self, PyObject *number)
{
	uint64_t inode = PyLong_AsUnsignedLongLong(number);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	no_capability_add(inode);
	Py_RETURN_NONE;
}

static PyObject *py_discard(PyObject *self, PyObject *number)
{
	uint64_t inode = PyLong_AsUnsignedLongLong(number);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	uint64_t *place = find(inode);
	if (place) {
		*place = REMOVED;
		if (!--live)
			clear();
		else if (count > LEAST && live < count / 8)
			resize();
	}
	Py_RETURN_NONE;
}

static PyObject *py_has(PyObject *self, PyObject *number)
{
	uint64_t inode = PyLong_AsUnsignedLongLong(number);

	(void)self;
	return PyErr_Occurred() ? NULL : PyBool_FromLong(find(inode) != NULL);
}

static PyObject *py_clear(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	clear();
	Py_RETURN_NONE;
}

static PyObject *py_answer(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	answers = true;
	Py_RETURN_NONE;
}

PyMethodDef no_capability_methods[] = {
	{ "no_capability_add", py_add, METH_O, "no_capability_add(inode): it has no security.capability." },
	{ "no_capability_discard", py_discard, METH_O, "no_capability_discard(inode): it may have one now." },
	{ "no_capability_has", py_has, METH_O, "no_capability_has(inode): whether it is known to have none." },
	{ "no_capability_clear", py_clear, METH_NOARGS, "no_capability_clear(): nothing is known any more." },
	{ "no_capability_answer", py_answer, METH_NOARGS,
	  "no_capability_answer(): answer the requests for it here, until prepare()." },
	{ NULL, NULL, 0, NULL },
};
