/*
 * Makes an input from others, for libFuzzer: whole records with meaningful fields.
 */
#include <string.h>

#include "fuzz.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t a_size, const uint8_t *b, size_t b_size, uint8_t *out,
				 size_t max, unsigned seed);

static uint64_t state;

static uint32_t any(uint32_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return below ? (state >> 16) % below : (uint32_t)(state >> 16);
}

static uint32_t number(void)
{
	static const uint32_t interesting[] = {
		0,      1,      2,      3,       4,        7,          8,          10,         11,
		12,     0x7f,   0x80,   0xff,    0x100,    0x3ff,      0x400,      0x3fc,      0x7fff,
		0x8000, 0xfffc, 0xffff, 0x10000, 0xffffff, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff,
	};

	switch (any(4)) {
	case 0:
		return interesting[any(sizeof interesting / sizeof *interesting)];
	case 1:
		return any(64);
	case 2:
		return any(4096);
	}
	return any(0);
}

/* Offset and width (its logarithm) of fields that matter. */
struct field {
	uint16_t at, width;
};
static const struct field superblock[] = {
	{ 0, 2 },   { 4, 2 },   { 12, 2 },  { 16, 2 },  { 20, 2 },  { 24, 2 },  { 32, 2 },  { 40, 2 },  { 44, 2 },
	{ 56, 1 },  { 58, 1 },  { 76, 2 },  { 84, 2 },  { 88, 1 },  { 92, 2 },  { 96, 2 },  { 100, 2 }, { 206, 1 },
	{ 224, 2 }, { 232, 2 }, { 252, 0 }, { 260, 2 }, { 348, 2 }, { 352, 2 }, { 584, 2 }, { 588, 2 },
};
static const struct field group[] = { { 0, 2 }, { 4, 2 }, { 8, 2 }, { 12, 1 }, { 14, 1 }, { 16, 1 } };
static const struct field inode[] = {
	{ 0, 1 },   { 4, 2 },   { 20, 2 },  { 26, 1 },  { 28, 2 },  { 32, 2 },  { 40, 2 },  { 44, 2 },
	{ 48, 2 },  { 88, 2 },  { 92, 2 },  { 96, 2 },  { 100, 2 }, { 104, 2 }, { 108, 2 }, { 116, 1 },
	{ 118, 1 }, { 128, 1 }, { 160, 2 }, { 164, 0 }, { 165, 0 }, { 166, 1 }, { 168, 2 }, { 172, 2 },
};
static const struct field index_root[] = {
	{ 24, 2 }, { 28, 0 }, { 29, 0 }, { 30, 0 }, { 32, 1 }, { 34, 1 }, { 36, 2 },
	{ 40, 2 }, { 44, 2 }, { 48, 2 }, { 4, 1 },  { 12, 2 }, { 16, 1 }, { 18, 0 },
};
static const struct field xattrs[] = {
	{ 0, 2 }, { 4, 2 }, { 8, 2 }, { 12, 2 }, { 32, 0 }, { 33, 0 }, { 34, 1 }, { 36, 2 }, { 40, 2 }, { 44, 2 },
};
static const struct field journal[] = {
	{ 0, 2 },  { 4, 2 },  { 8, 2 },  { 12, 2 }, { 16, 2 }, { 20, 2 },
	{ 24, 2 }, { 28, 2 }, { 32, 2 }, { 36, 2 }, { 40, 2 }, { 44, 2 },
};
static const struct field redo_head[] = { { 0, 2 },  { 8, 2 },  { 12, 2 }, { 16, 2 }, { 80, 2 },
					  { 88, 2 }, { 92, 2 }, { 96, 2 }, { 100, 2 } };

#define FIELDS(array) { array, sizeof array / sizeof *array }
static const struct {
	const struct field *field;
	uint32_t n;
} fields[REGIONS] = {
	[SUPERBLOCK] = FIELDS(superblock), [GROUPS] = FIELDS(group),  [INODES] = FIELDS(inode),
	[INDEXES] = FIELDS(index_root),    [XATTRS] = FIELDS(xattrs), [JOURNAL] = FIELDS(journal),
	[REDO_HEAD] = FIELDS(redo_head),
};

/* A region, mostly not file contents. */
static uint8_t some_region(void)
{
	return any(12) ? any(CONTENTS) : any(REGIONS);
}

static void make_patch(struct record *r)
{
	r->a = some_region();
	r->b = any(3) ? any(16) : any(0);
	r->c = any(3) ? any(256) & ~3u : any(0);
	r->d = number();
	r->e = any(3) | any(4) << 3;
	if (fields[r->a].n && any(4)) {
		const struct field *f = &fields[r->a].field[any(fields[r->a].n)];
		r->c = f->at;
		r->e = f->width | any(4) << 3;
	}
	if ((r->e >> 3 & 3) == 2)
		r->d = any(3) - 1;
	else if ((r->e >> 3 & 3) == 3)
		r->d = some_region() << 16 | any(64);
	if (r->a == JOURNAL || r->a == JOURNAL_LOG)
		r->e |= 4;
}

static void make_operation(struct record *r)
{
	static const uint8_t often[] = { LIST,     CREATE,    WRITE, REMOVE, RENAME,
					 TRUNCATE, SET_XATTR, LINK,  CRASH,  COMMIT_ALL };

	if (any(2))
		r->op = often[any(sizeof often)];
	*r = (struct record){ .op = r->op,
			      .a = any(0),
			      .b = any(12),
			      .c = any(3) ? any(40) : number(),
			      .d = any(0),
			      .e = any(3) ? any(4) : any(0) };
	if (r->op == WRITE)
		r->c = any(70000);
	else if (r->op == CREATE || r->op == LINK)
		r->c = any(10) * 1000 + any(20);
	else if (r->op == CREATE_MANY || r->op == LINK_MANY || r->op == SCATTER)
		r->c = any(150), r->e = any(10000);
	else if (r->op == RENAME || r->op == LINK)
		r->d = any(10) * 1000 + any(20);
	else if (r->op == INJECT)
		r->d &= any(4) ? ~1u : ~0u;
}

static void make_record(struct record *r)
{
	*r = (struct record){ .op = any(3) ? any(OPERATIONS) : PATCH + any(DAMAGES - PATCH) };
	switch (r->op) {
	case PATCH:
		make_patch(r);
		break;
	case COPY:
	case FILL:
		*r = (struct record){ r->op, some_region(), any(32), any(3) ? some_region() : any(0), any(32), any(0) };
		break;
	case CUT:
		if (any(20)) {
			r->op = PATCH;
			make_patch(r);
		}
		r->c = any(0);
		break;
	case FORGE_LOG:
	case FORGE_REDO:
		r->e = !any(8);
		break;
	case LOG:
		*r = (struct record){ LOG,      any(4) | some_region() << 2,
				      any(32),  any(3) ? any(256) & ~3u : some_region(),
				      number(), any(3) ? 0 : any(0) };
		break;
	case REDO:
		*r = (struct record){ REDO,     some_region(),
				      any(32),  any(3) ? any(256) & ~3u : any(0),
				      number(), any(2) ? any(64) : any(0) };
		break;
	default:
		make_operation(r);
	}
}

/* Insert *n* new records at a place. Some come together: a forged log, or a crash and the records after it. */
static size_t insert(struct record *records, size_t n, size_t max)
{
	size_t at = n ? 1 + any(n) : 0, count = any(4) ? 1 : 1 + any(12);
	uint8_t op = any(8) ? CODES : any(2) ? LOG : REDO;

	at = at > n ? n : at;
	count = n + count > max ? max - n : count;
	memmove(records + at + count, records + at, (n - at) * sizeof *records);
	for (size_t i = at; i < at + count; i++) {
		make_record(&records[i]);
		while (op != CODES && records[i].op != op)
			make_record(&records[i]);
	}
	if (op != CODES && count)
		records[at] = (struct record){ .op = op == LOG ? FORGE_LOG : FORGE_REDO };
	return n + count;
}

static void change(struct record *r)
{
	switch (any(8)) {
	case 0:
		make_record(r);
		break;
	case 1:
		r->a = any(2) ? any(0) : r->a ^ 1 << any(8);
		break;
	case 2:
		r->b = any(2) ? any(32) : r->b + any(3) - 1;
		break;
	case 3:
		r->c = any(2) ? number() : r->c + any(9) - 4;
		break;
	case 4:
		r->d = any(2) ? number() : r->d + any(9) - 4;
		break;
	case 5:
		r->e = any(2) ? any(0) : r->e ^ 1u << any(16);
		break;
	default:
		LLVMFuzzerMutate((uint8_t *)r, sizeof *r, sizeof *r);
	}
}

static size_t mutate_once(struct record *records, size_t n, size_t max)
{
	size_t i = n ? any(n) : 0, k = n ? any(n) : 0, count;

	switch (n < 3 ? 0 : any(10)) {
	case 0:
	case 1:
	case 2:
	case 3:
		return n < max ? insert(records, n, max) : n;
	case 4: /* remove some */
		count = 1 + any(any(3) ? 2 : n - i);
		count = i + count > n ? n - i : count;
		memmove(records + i, records + i + count, (n - i - count) * sizeof *records);
		return n - count;
	case 5: /* repeat some later */
		if (n < max && i) {
			struct record again = records[i];
			memmove(records + k + 1, records + k, (n - k) * sizeof *records);
			records[k ? k : 1] = again;
			return n + 1;
		}
		return n;
	case 6: {
		struct record other = records[i];
		records[i] = records[k];
		records[k] = other;
		return n;
	}
	}
	change(&records[i]);
	return n;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed)
{
	struct record records[RECORDS_MAX];
	size_t most = max / sizeof *records < RECORDS_MAX ? max / sizeof *records : RECORDS_MAX;
	size_t n = size / sizeof *records < most ? size / sizeof *records : most;

	state = seed * 0x9e3779b97f4a7c15u | 1;
	memcpy(records, data, n * sizeof *records);
	if (!n && most)
		records[n++] = (struct record){ .a = any(16), .b = any(0), .c = any(0) };
	for (uint32_t i = 1 + any(any(3) ? 2 : 6); i--;)
		n = mutate_once(records, n, most);
	memcpy(data, records, n * sizeof *records);
	return n * sizeof *records;
}

/* Combine the beginning of one input and the end of another. */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t a_size, const uint8_t *b, size_t b_size, uint8_t *out,
				 size_t max, unsigned seed)
{
	size_t one = sizeof(struct record), head, tail;

	state = seed * 0x9e3779b97f4a7c15u | 1;
	if (a_size < one || b_size < one)
		return 0;
	head = (1 + any(a_size / one)) * one;
	head = head > max ? max / one * one : head;
	head = head > a_size ? a_size / one * one : head;
	tail = (1 + any(b_size / one)) * one;
	tail = tail > max - head ? (max - head) / one * one : tail;
	tail = tail > b_size ? b_size / one * one : tail;
	memcpy(out, a, head);
	memcpy(out + head, b + b_size / one * one - tail, tail);
	return head + tail;
}
