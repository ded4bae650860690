/*
 * Recording which parts of the image were written, so that it can be copied while it is in use.
 *
 * Each unit has a bit, which every thread sets after a write. The copier clears a bit and then reads the unit; a write
 * in between sets it again. The map has bits for all units of the largest ext3, so it need not change when the image
 * grows. Only the pages of it that are in use take memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "internal.h"

#define UNIT_BITS 20
#define UNITS (1u << 24)
#define WORDS (UNITS / 64)

int x3_track(x3_image *img, int on)
{
	uint64_t *map = __atomic_load_n(&img->track.map, __ATOMIC_ACQUIRE);

	if (on && !map) {
		map = calloc(WORDS, sizeof *map);
		if (!map)
			return -ENOMEM;
		__atomic_store_n(&img->track.map, map, __ATOMIC_RELEASE); /* stays until x3_close: writers use it */
	}
	__atomic_store_n(&img->track.on, on, __ATOMIC_RELEASE);
	for (uint32_t i = 0; map && i < WORDS; i++)
		if (map[i])
			__atomic_store_n(map + i, 0, __ATOMIC_RELAXED);
	img->track.beyond = false;
	return 0;
}

void track_write(x3_image *img, uint64_t off, uint64_t end)
{
	if (!__atomic_load_n(&img->track.on, __ATOMIC_ACQUIRE))
		return;
	for (uint64_t unit = off >> UNIT_BITS; unit << UNIT_BITS < end; unit++) {
		if (unit >= UNITS) {
			img->track.beyond = true;
			return;
		}
		__atomic_fetch_or(img->track.map + unit / 64, UINT64_C(1) << unit % 64, __ATOMIC_RELEASE);
	}
}

int64_t x3_tracked(x3_image *img, uint32_t *units, uint64_t cap)
{
	uint64_t count = 0;

	if (!img->track.on)
		return -EINVAL;
	if (img->track.beyond)
		return -EFBIG;
	for (uint32_t i = 0; i < WORDS && count + 64 <= cap; i++) {
		uint64_t word = img->track.map[i] ? __atomic_exchange_n(img->track.map + i, 0, __ATOMIC_ACQ_REL) : 0;
		for (; word; word &= word - 1)
			units[count++] = i * 64 + __builtin_ctzll(word);
	}
	return count;
}

void track_free(x3_image *img)
{
	free(img->track.map);
}
