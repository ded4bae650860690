/*
 * The images that runs begin with. The environment variable COWFS_FUZZ_IMAGES names their directory, on a tmpfs. The
 * image of a run is there too.
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

#define BASES_MAX 16
#define PAGE 4096u

static struct base bases[BASES_MAX];
static unsigned nbases;
static unsigned char *image;
static int image_fd;
static char image_path[4096];

static unsigned char *read_file(const char *directory, unsigned number, const char *suffix, uint32_t *size)
{
	char path[4096];
	unsigned char *data;
	struct stat st;
	int fd;

	snprintf(path, sizeof path, "%s/%u.%s", directory, number, suffix);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	if (fstat(fd, &st) || !(data = malloc(st.st_size)) || read(fd, data, st.st_size) != st.st_size)
		err(1, "%s", path);
	close(fd);
	*size = st.st_size;
	return data;
}

/* The map: for each region u32 count, and as many u32 offset, u32 length. */
static bool base_load(struct base *base, const char *directory, unsigned number)
{
	uint32_t size = 0, used = 0;
	uint32_t *map;

	base->data = read_file(directory, number, "img", &base->size);
	if (!base->data)
		return false;
	map = (uint32_t *)read_file(directory, number, "map", &size);
	for (int i = 0; i < REGIONS; i++) {
		if (!map || (used + 1) * 4 > size || (used + 1 + 2 * map[used]) * 4 > size)
			errx(1, "%s/%u.map: is not of this version", directory, number);
		base->region[i].n = map[used];
		base->region[i].piece = (struct piece *)(map + used + 1);
		used += 1 + 2 * map[used];
	}
	base->block_size = 1024u << *(uint32_t *)(base->data + 1024 + 24);
	return true;
}

static void remove_image(void)
{
	unlink(image_path);
}

void bases_load(void)
{
	const char *directory = getenv("COWFS_FUZZ_IMAGES");
	uint32_t largest = 0;

	if (!directory)
		errx(1, "COWFS_FUZZ_IMAGES is not set: see tests/fuzz/README.md");
	while (nbases < BASES_MAX && base_load(&bases[nbases], directory, nbases)) {
		largest = bases[nbases].size > largest ? bases[nbases].size : largest;
		nbases++;
	}
	if (!nbases)
		errx(1, "%s: has no images", directory);
	/* The image needs a name: a file without one gets no redo log. */
	snprintf(image_path, sizeof image_path, "%s/run.%d", directory, getpid());
	image_fd = open(image_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (image_fd < 0)
		err(1, "%s", image_path);
	atexit(remove_image);
	image = mmap(NULL, largest + ROOM_TO_GROW, PROT_READ | PROT_WRITE, MAP_SHARED, image_fd, 0);
	if (image == MAP_FAILED)
		err(1, "mmap");
}

const struct base *base_of(unsigned number)
{
	return &bases[number % nbases];
}

void world_resize(struct world *w, uint64_t size)
{
	if (ftruncate(w->fd, size))
		err(1, "ftruncate");
	w->size = size;
}

/* Restore the base image in the file; most of it has not changed. */
void world_begin(struct world *w, const struct base *base)
{
	*w = (struct world){ .base = base, .fd = image_fd, .image = image, .known = { 2 }, .nknown = 1 };
	world_resize(w, base->size); /* a run may have resized it */
	for (uint32_t at = 0; at < base->size; at += PAGE) {
		uint32_t length = base->size - at < PAGE ? base->size - at : PAGE;
		if (memcmp(image + at, base->data + at, length))
			memcpy(image + at, base->data + at, length);
	}
}
