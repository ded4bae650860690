/*
 * The core lock ensures that one thread at a time runs Python code that uses the union. A ring's thread holds it from
 * the arrival of a request until it waits for the next. trio's thread holds it except while it waits for I/O. A thread
 * takes the lock without holding the GIL, and only the holder takes the GIL, so that threads do not compete for the
 * GIL.
 */
#define _GNU_SOURCE
#include "core_lock.h"

#include <pthread.h>
#include <stdatomic.h>

static pthread_mutex_t core;
static atomic_uint waiters;
static pthread_mutex_t turnstile =
	PTHREAD_MUTEX_INITIALIZER; /* trio's thread holds it while it waits for the core lock */
static atomic_bool trio_waits;

void core_lock_init(void)
{
	pthread_mutexattr_t adaptive;
	pthread_mutexattr_init(&adaptive);
	pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
	pthread_mutex_init(&core, &adaptive);
}

void core_lock_take(void)
{
	if (atomic_load(&trio_waits)) {
		pthread_mutex_lock(&turnstile);
		pthread_mutex_unlock(&turnstile);
	}
	if (pthread_mutex_trylock(&core) == 0)
		return;
	atomic_fetch_add(&waiters, 1);
	pthread_mutex_lock(&core);
	atomic_fetch_sub(&waiters, 1);
}

/* Take the lock next. For trio's thread, which would otherwise starve while all other threads are busy. */
static void take_next(void)
{
	pthread_mutex_lock(&turnstile);
	atomic_store(&trio_waits, true);
	atomic_fetch_add(&waiters, 1);
	pthread_mutex_lock(&core);
	atomic_fetch_sub(&waiters, 1);
	atomic_store(&trio_waits, false);
	pthread_mutex_unlock(&turnstile);
}

void core_lock_give(void)
{
	pthread_mutex_unlock(&core);
}

bool core_lock_wanted(void)
{
	return atomic_load(&waiters);
}

static PyObject *py_lock(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (pthread_mutex_trylock(&core)) {
		Py_BEGIN_ALLOW_THREADS
		take_next();
		Py_END_ALLOW_THREADS
	}
	Py_RETURN_NONE;
}

static PyObject *py_unlock(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	pthread_mutex_unlock(&core);
	Py_RETURN_NONE;
}

static PyObject *py_take(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	Py_BEGIN_ALLOW_THREADS
	core_lock_take();
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

PyMethodDef core_lock_methods[] = {
	{ "core_lock", py_lock, METH_NOARGS, "core_lock(): take the core lock, for trio's thread. Blocks." },
	{ "core_take", py_take, METH_NOARGS, "core_take(): take the core lock, for any other thread. Blocks." },
	{ "core_unlock", py_unlock, METH_NOARGS, "core_unlock(): release the core lock." },
	{ NULL, NULL, 0, NULL },
};
