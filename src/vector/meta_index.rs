//! An inverted index over metadata: from what a filter asks for to the slots that have it, without parsing any JSON.
//!
//! ```text
//! {"lang":"es","tags":["a","b"],"who":{"age":7}}   in slot 5
//!     lang     exists {5}   strings "es" → {5}
//!     tags     exists {5}   strings "a" → {5}, "b" → {5}   listed {5}
//!     who      exists {5}
//!     who.age  exists {5}   numbers 7 → {5}
//! ```
//!
//! A filter is evaluated leaf by leaf to two sets: the slots that `may` satisfy it, and among them those in `doubt`. The
//! rest surely do. Both are needed because of `$not`: the complement of a superset would lose slots, so a negation
//! keeps what is in doubt and complements what is not. Doubt comes from what the index leaves out on purpose:
//! - strings are keyed by their beginning ([`STRING_KEY_BYTES`]): long texts are not held twice;
//! - numbers are keyed as 64-bit floats, and from 2^53 on two integers may share one;
//! - positions in arrays (`tags.1`) and whole arrays and objects as operands are not indexed.
//!
//! Invariants
//! - `Filter::matches` on the parsed metadata is the truth: what it accepts is in the selection, and an exact
//!   selection holds nothing else.
//! - A path is indexed under joined names, so a name that holds a dot or is empty is left out: no filter reaches it.
//! - `exists` of a path holds every slot that any other set of that path holds.
//! - Removing what was inserted leaves nothing behind: no empty set, value or path.
//! - No slice of work under the lock is longer than one value's slots or [`SLICE_WORK_MAX`].
//!
//! Deliberately absent: the lock (see [`select`]), statistics for a planner, and anything on disk: the index is built
//! from the metadata that is in memory anyway.

use super::filter::{Filter, Node, PATH_NAMES_MAX, Test};
use super::{Slot, VectorMeta};
use roaring::{MultiOps, RoaringBitmap};
use serde_json::{Number, Value};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound::{self, Excluded, Included, Unbounded};

/// Strings up to this length are keys as they are; of longer ones the key is the first bytes beyond it that end a
/// character. So a key longer than this stands for every string that begins with it.
pub const STRING_KEY_BYTES: usize = 64;
/// How much of a range is read in one go, in slots: some 20 µs, more where values of a few slots each are strewn over millions.
const SLICE_WORK_MAX: usize = 16_384;
/// What going to the next value costs in the same unit: a slice ends after a thousand values of one slot.
const VALUE_WORK: usize = 16;
/// Slots held without an allocation. Most values of a name or a time have one; three fit where a pointer does.
const FEW: usize = 3;
/// From here on (2^53) not every integer is a 64-bit float.
const INTEGERS_EXACT_BELOW: f64 = 9_007_199_254_740_992.0;

/// Which slots have which metadata.
#[derive(Debug, Default)]
pub struct MetaIndex {
    // Trees rather than hash tables throughout: they give memory back, and growth has no pause.
    fields: BTreeMap<Box<str>, Field>,
    occupied: Posting,
    /// Estimate of the heap that `fields` and `occupied` hold.
    bytes: usize,
}

/// What the values at one path are.
#[derive(Debug, Default)]
struct Field {
    exists: Posting,
    null: Posting,
    yes: Posting,
    no: Posting,
    /// Slots whose path leads through or to an array, so that they may have several values here.
    listed: Posting,
    numbers: BTreeMap<NumberKey, Posting>,
    strings: BTreeMap<StringKey, Posting>,
}

/// A set of slots.
#[derive(Debug)]
enum Posting {
    /// How many, and which in no order.
    Few(u8, [u32; FEW]),
    Many(Box<Bits>),
}

#[derive(Debug)]
struct Bits {
    slots: RoaringBitmap,
    len: usize,
    /// Estimate of the heap held, as of the last count.
    bytes: usize,
    /// Changes until it is counted again.
    count_in: usize,
}

/// A finite number's bits, arranged so that they order as the numbers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct NumberKey(u64);

/// Most values of one slot, elements of arrays included.
pub const VALUES_MAX: usize = 256;
/// Longest path in bytes.
pub const PATH_BYTES_MAX: usize = 256;

/// A string or its beginning. Order is kept: a smaller string never has a greater key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct StringKey(Box<str>);

trait Key: Clone + Ord {
    fn heap_bytes(&self) -> usize;
}

/// One insertion or removal on its way through the index.
struct Edit {
    slot: u32,
    change: Change,
    bytes: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Change {
    Insert,
    Remove,
}

/// What a filter selects.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Every slot that satisfies the filter.
    pub slots: RoaringBitmap,
    /// Whether no other slot is among them; otherwise each must be checked with [`Filter::matches`].
    pub is_exact: bool,
}

/// Lends the index for a short while by calling what it is given exactly once.
pub type Look<'a> = &'a dyn Fn(&mut dyn FnMut(&MetaIndex));

impl MetaIndex {
    /// Adds a slot, which must not be in the index: a change of metadata is a removal and an insertion. O(values · log
    /// of distinct values); 1 µs for five values. False, and nothing is done, when the metadata has more than
    /// [`VALUES_MAX`] values or a path longer than [`PATH_BYTES_MAX`]: a client must not make the index a hundred times
    /// larger than what it sent, nor its upkeep slow.
    pub fn insert(&mut self, slot: Slot, meta: &VectorMeta) -> bool {
        let meta = meta.parse();
        let (mut values, mut is_long) = (0, false);
        each_path(&meta, &mut String::new(), 0, false, &mut |path, value, _| {
            values += 1 + value.as_array().map_or(0, Vec::len);
            is_long |= path.len() > PATH_BYTES_MAX;
        });
        let fits = values <= VALUES_MAX && !is_long;
        if fits {
            self.edit(slot, &meta, Change::Insert);
        }
        fits
    }

    /// Takes a slot out, given the metadata it was inserted with.
    pub fn remove(&mut self, slot: Slot, meta: &VectorMeta) {
        self.edit(slot, &meta.parse(), Change::Remove);
    }

    /// Estimate of the memory it takes. O(1).
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.bytes
    }

    fn edit(&mut self, slot: Slot, meta: &Value, change: Change) {
        let mut edit = Edit { slot: slot.0, change, bytes: self.bytes };
        let before = self.occupied.len();
        self.occupied.apply(&mut edit);
        assert_ne!(before, self.occupied.len(), "a slot is inserted once and then removed once");
        // `parse` rather than a parser of its own that streams: what it takes a text for is what filters see. It is a
        // third of the cost.
        each_path(meta, &mut String::new(), 0, false, &mut |path, value, in_list| {
            self.apply(path, value, in_list, &mut edit);
        });
        self.bytes = edit.bytes;
    }

    fn apply(&mut self, path: &str, value: &Value, in_list: bool, edit: &mut Edit) {
        if let Some(field) = self.fields.get_mut(path) {
            field.apply(value, in_list, edit);
            if field.is_empty() {
                let before = tree_bytes::<Box<str>, Field>(self.fields.len()) + allocated(path.len());
                self.fields.remove(path);
                edit.charge(before, tree_bytes::<Box<str>, Field>(self.fields.len()));
            }
        } else if edit.change == Change::Insert {
            let mut field = Field::default();
            field.apply(value, in_list, edit);
            let before = tree_bytes::<Box<str>, Field>(self.fields.len());
            self.fields.insert(path.into(), field);
            edit.charge(before, tree_bytes::<Box<str>, Field>(self.fields.len()) + allocated(path.len()));
        }
    }
}

/// Calls `visit` with each path that a filter can name without a position, its value, and whether an array was passed
/// on the way. Follows what `filter::any_at` follows: the elements of an array that are objects.
fn each_path(value: &Value, path: &mut String, names: usize, in_list: bool, visit: &mut dyn FnMut(&str, &Value, bool)) {
    match value {
        Value::Object(map) if names < PATH_NAMES_MAX => {
            for (name, value) in map.iter().filter(|(name, _)| !name.is_empty() && !name.contains('.')) {
                let parent = path.len();
                if names > 0 {
                    path.push('.');
                }
                path.push_str(name);
                visit(path, value, in_list);
                each_path(value, path, names + 1, in_list, visit);
                path.truncate(parent);
            }
        }
        Value::Array(list) => {
            for value in list.iter().filter(|v| v.is_object()) {
                each_path(value, path, names, true, visit);
            }
        }
        _ => {}
    }
}

impl Field {
    fn apply(&mut self, value: &Value, in_list: bool, edit: &mut Edit) {
        self.exists.apply(edit);
        if in_list || value.is_array() {
            self.listed.apply(edit);
        }
        match value {
            Value::Array(list) => list.iter().for_each(|v| self.apply_one(v, edit)),
            _ => self.apply_one(value, edit),
        }
    }

    fn apply_one(&mut self, value: &Value, edit: &mut Edit) {
        match value {
            Value::Null => self.null.apply(edit),
            Value::Bool(true) => self.yes.apply(edit),
            Value::Bool(false) => self.no.apply(edit),
            Value::Number(number) => apply_value(&mut self.numbers, NumberKey::new(number), edit),
            Value::String(text) => apply_value(&mut self.strings, StringKey::new(text), edit),
            Value::Array(_) | Value::Object(_) => {}
        }
    }

    /// In the middle of a removal `exists` may be empty before the rest is.
    fn is_empty(&self) -> bool {
        [&self.exists, &self.null, &self.yes, &self.no, &self.listed].iter().all(|p| p.len() == 0)
            && self.numbers.is_empty()
            && self.strings.is_empty()
    }
}

fn apply_value<K: Key>(values: &mut BTreeMap<K, Posting>, key: K, edit: &mut Edit) {
    let before = tree_bytes::<K, Posting>(values.len());
    let key_bytes = key.heap_bytes();
    match values.entry(key) {
        Entry::Occupied(mut old) => {
            old.get_mut().apply(edit);
            if old.get().len() == 0 {
                old.remove_entry();
                edit.charge(before + key_bytes, tree_bytes::<K, Posting>(values.len()));
            }
        }
        Entry::Vacant(free) if edit.change == Change::Insert => {
            free.insert(Posting::default()).apply(edit);
            edit.charge(before, tree_bytes::<K, Posting>(values.len()) + key_bytes);
        }
        // Removed a moment ago: an array may repeat a value.
        Entry::Vacant(_) => {}
    }
}

impl Edit {
    fn charge(&mut self, before: usize, after: usize) {
        self.bytes = self.bytes + after - before;
    }
}

impl Default for Posting {
    fn default() -> Self {
        Self::Few(0, [0; FEW])
    }
}

impl Posting {
    fn len(&self) -> usize {
        match self {
            Self::Few(len, _) => usize::from(*len),
            Self::Many(bits) => bits.len,
        }
    }

    /// Adds or takes out the slot; either may have been done before.
    fn apply(&mut self, edit: &mut Edit) {
        match edit.change {
            Change::Insert => self.insert(edit),
            Change::Remove => self.remove(edit),
        }
    }

    fn insert(&mut self, edit: &mut Edit) {
        match self {
            Self::Few(len, slots) => {
                let held = usize::from(*len);
                if slots[..held].contains(&edit.slot) {
                    return;
                }
                if held < FEW {
                    slots[held] = edit.slot;
                    *len += 1;
                    return;
                }
                let slots = slots.iter().copied().chain([edit.slot]).collect();
                let mut bits = Box::new(Bits { slots, len: FEW + 1, bytes: 0, count_in: 0 });
                bits.changed(edit);
                *self = Self::Many(bits);
            }
            Self::Many(bits) => {
                if bits.slots.insert(edit.slot) {
                    bits.len += 1;
                    bits.changed(edit);
                }
            }
        }
    }

    fn remove(&mut self, edit: &mut Edit) {
        match self {
            Self::Few(len, slots) => {
                let held = usize::from(*len);
                if let Some(at) = slots[..held].iter().position(|&s| s == edit.slot) {
                    slots[at] = slots[held - 1];
                    *len -= 1;
                }
            }
            Self::Many(bits) => {
                if !bits.slots.remove(edit.slot) {
                    return;
                }
                bits.len -= 1;
                if bits.len > FEW {
                    return bits.changed(edit);
                }
                let mut few = [0; FEW];
                few.iter_mut().zip(&bits.slots).for_each(|(place, slot)| *place = slot);
                edit.charge(bits.bytes, 0);
                // The cast: all of FEW slots are left.
                *self = Self::Few(FEW as u8, few);
            }
        }
    }

    /// Adds the slots to those of a union: the many as the sets they are, the few one by one.
    fn gather<'a>(&'a self, many: &mut Vec<&'a RoaringBitmap>, few: &mut Vec<u32>) {
        match self {
            Self::Few(len, slots) => few.extend(&slots[..usize::from(*len)]),
            Self::Many(bits) => many.push(&bits.slots),
        }
    }

    fn to_bitmap(&self) -> RoaringBitmap {
        match self {
            Self::Few(len, slots) => slots[..usize::from(*len)].iter().collect(),
            Self::Many(bits) => bits.slots.clone(),
        }
    }
}

impl Bits {
    /// Counting walks the containers, one for each 65,536 slots, so a large set is counted again only after a
    /// sixteenth of it changed.
    fn changed(&mut self, edit: &mut Edit) {
        if self.count_in > 0 {
            self.count_in -= 1;
            return;
        }
        let found = self.slots.statistics();
        let [containers, arrays, bitsets] =
            [found.n_containers, found.n_array_containers, found.n_bitset_containers].map(to_usize);
        // Not the bytes that `statistics` gives: roaring 0.12 counts arrays twice and bitsets in bits.
        // Arrays of 2-byte numbers grow by doubling: half as much again on average.
        let array_bytes = (to_usize(found.n_values_array_containers) * 3).max(arrays * 8);
        let bytes = allocated(size_of::<Self>())
            + allocated(containers.next_power_of_two().max(4) * CONTAINER_BYTES)
            + array_bytes
            + bitsets * 8192;
        // An eighth for the holes that growing arrays leave, as measured with mimalloc.
        let bytes = bytes + bytes / 8;
        edit.charge(self.bytes, bytes);
        self.bytes = bytes;
        self.count_in = self.len / 16;
    }
}

/// Size of the header of one of roaring's containers.
const CONTAINER_BYTES: usize = 40;

fn to_usize(n: u32) -> usize {
    n as usize
}

/// What the allocator really takes for an object: its size classes are 16 bytes apart, and from 128 bytes on four to
/// each power of two.
fn allocated(bytes: usize) -> usize {
    match bytes {
        0..=8 => bytes.next_multiple_of(8),
        9..=128 => bytes.next_multiple_of(16),
        _ => bytes.next_multiple_of((1 << (bytes - 1).ilog2()) / 4),
    }
}

/// Heap of a `BTreeMap`, from the layout of its nodes: 11 pairs each, and 12 links more in an inner one. On average 6.7
/// of the 11 are taken: measured were 6 after ascending insertions and 7.6 after random ones.
fn tree_bytes<K, V>(len: usize) -> usize {
    let leaf = allocated(11 * (size_of::<K>() + size_of::<V>()) + 16);
    match len {
        0 => 0,
        1..=11 => leaf,
        _ => (len * 3 + 20) * (leaf + 12) / 20,
    }
}

impl NumberKey {
    fn new(number: &Number) -> Self {
        let float = number.as_f64().expect("serde_json keeps numbers as 64-bit integers and floats");
        // Adding zero makes -0 the 0 it equals.
        let bits = (float + 0.0).to_bits();
        Self(if bits >> 63 == 1 { !bits } else { bits | 1 << 63 })
    }
}

impl StringKey {
    fn new(text: &str) -> Self {
        if text.len() <= STRING_KEY_BYTES {
            return Self(text.into());
        }
        let end = (STRING_KEY_BYTES + 1..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
        Self(text[..end].into())
    }
}

impl Key for NumberKey {
    fn heap_bytes(&self) -> usize {
        0
    }
}

impl Key for StringKey {
    fn heap_bytes(&self) -> usize {
        allocated(self.0.len())
    }
}

/// Evaluates a filter. `look` lends the index and is called again and again, each time for a bounded piece of work, so
/// that a range over a million values never holds the lock behind it for long. A slot whose metadata changes meanwhile
/// may be in the selection or not, exact or not; all others are as if the index had stood still.
#[must_use]
pub fn select(filter: &Filter, look: Look<'_>) -> Selection {
    let found = Evaluation { look }.node(filter.root());
    Selection { slots: found.may, is_exact: found.doubt.is_empty() }
}

/// Slots that may satisfy a condition; those not in doubt do.
#[derive(Default)]
struct Bounds {
    may: RoaringBitmap,
    /// A part of `may`.
    doubt: RoaringBitmap,
}

impl Bounds {
    fn exact(slots: RoaringBitmap) -> Self {
        Self { may: slots, doubt: RoaringBitmap::new() }
    }

    /// Surely `must`, and perhaps also `others`.
    fn between(must: RoaringBitmap, others: &RoaringBitmap) -> Self {
        Self { doubt: others - &must, may: must | others }
    }

    fn and(mut self, other: &Self) -> Self {
        self.may &= &other.may;
        self.doubt |= &other.doubt;
        self.doubt &= &self.may;
        self
    }

    fn or(mut self, other: &Self) -> Self {
        if !(self.doubt.is_empty() && other.doubt.is_empty()) {
            let sure = (&self.may - &self.doubt) | (&other.may - &other.doubt);
            self.doubt |= &other.doubt;
            self.doubt -= sure;
        }
        self.may |= &other.may;
        self
    }

    fn not(self, occupied: RoaringBitmap) -> Self {
        Self { may: (occupied - self.may) | &self.doubt, doubt: self.doubt }
    }
}

struct Evaluation<'a> {
    look: Look<'a>,
}

/// A comparison: the operand's key, whether other values share that key, and which orders hold.
type Edge<K> = (K, bool, &'static [Ordering]);
type Values<K> = fn(&Field) -> &BTreeMap<K, Posting>;

impl Evaluation<'_> {
    fn node(&self, node: &Node) -> Bounds {
        match node {
            Node::All(nodes) => self.all(nodes),
            Node::Any(nodes) => nodes.iter().fold(Bounds::default(), |found, n| found.or(&self.node(n))),
            Node::Not(node) => self.node(node).not(self.occupied()),
            Node::Field(path, test) => self.field(path, test),
        }
    }

    /// Single values first: what they leave empty spares the ranges.
    fn all(&self, nodes: &[Node]) -> Bounds {
        let mut nodes: Vec<&Node> = nodes.iter().collect();
        nodes.sort_by_key(|node| match node {
            Node::Field(_, Test::Order(..) | Test::Prefix(_)) => 1,
            Node::Field(..) => 0,
            _ => 2,
        });
        let mut left = nodes.as_slice();
        let mut all: Option<Bounds> = None;
        while let [first, rest @ ..] = left
            && all.as_ref().is_none_or(|found| !found.may.is_empty())
        {
            let next = match rest.first().and_then(|second| self.interval(first, second)) {
                Some(both) => {
                    left = &rest[1..];
                    both
                }
                None => {
                    left = rest;
                    self.node(first)
                }
            };
            all = Some(match all {
                Some(found) => found.and(&next),
                None => next,
            });
        }
        all.unwrap_or_else(|| Bounds::exact(self.occupied()))
    }

    /// A lower and an upper limit on one field as one range: apart, each would walk nearly all values. Only where every
    /// slot has one value there: of several, one may satisfy the lower limit and another the upper.
    fn interval(&self, a: &Node, b: &Node) -> Option<Bounds> {
        let (Node::Field(path, Test::Order(a, a_wanted)), Node::Field(b_path, Test::Order(b, b_wanted))) = (a, b)
        else {
            return None;
        };
        let opposed = a_wanted.contains(&Ordering::Greater) != b_wanted.contains(&Ordering::Greater);
        let name = path.join(".");
        let is_single = || self.lend(|index| index.fields.get(&*name).is_none_or(|f| f.listed.len() == 0));
        (opposed && path == b_path && position(path).is_none() && is_single())
            .then(|| self.order(&name, &[(a, a_wanted), (b, b_wanted)]))
    }

    fn field(&self, path: &[Box<str>], test: &Test) -> Bounds {
        let name = path.join(".");
        let mut found = match test {
            Test::Exists => Bounds::exact(self.set(&name, |f| &f.exists)),
            Test::Eq(operand) => self.equal(&name, operand),
            Test::In(operands) => operands.all.iter().fold(Bounds::default(), |all, o| all.or(&self.equal(&name, o))),
            Test::Order(operand, wanted) => self.order(&name, &[(operand, wanted)]),
            Test::Prefix(prefix) => self.prefix(&name, prefix),
        };
        // A name that is a number may also be a position: any slot that has what comes before it may have a value there.
        let perhaps = match position(path) {
            Some(0) => self.occupied(),
            Some(at) => self.set(&path[..at].join("."), |f| &f.exists),
            None => RoaringBitmap::new(),
        };
        if !perhaps.is_empty() {
            let must = found.may - found.doubt;
            found = Bounds::between(must, &perhaps);
        }
        if test.wants_absent() {
            let present = Bounds::between(self.set(&name, |f| &f.exists), &perhaps);
            found = found.or(&present.not(self.occupied()));
        }
        found
    }

    fn equal(&self, name: &str, operand: &Value) -> Bounds {
        match operand {
            Value::Null => Bounds::exact(self.set(name, |f| &f.null)),
            Value::Bool(true) => Bounds::exact(self.set(name, |f| &f.yes)),
            Value::Bool(false) => Bounds::exact(self.set(name, |f| &f.no)),
            Value::Number(number) => self.value(name, |f| &f.numbers, NumberKey::new(number), is_shared(number)),
            Value::String(text) => {
                let key = StringKey::new(text);
                let shared = key.0.len() > STRING_KEY_BYTES;
                self.value(name, |f| &f.strings, key, shared)
            }
            Value::Array(_) | Value::Object(_) => Bounds::between(RoaringBitmap::new(), &self.set(name, |f| &f.exists)),
        }
    }

    fn value<K: Key>(&self, name: &str, values: Values<K>, key: K, is_shared: bool) -> Bounds {
        let slots = self.lend(|index| {
            index.fields.get(name).and_then(|f| values(f).get(&key)).map(Posting::to_bitmap).unwrap_or_default()
        });
        if is_shared { Bounds::between(RoaringBitmap::new(), &slots) } else { Bounds::exact(slots) }
    }

    /// At most one lower and one upper limit.
    fn order(&self, name: &str, limits: &[(&Value, &'static [Ordering])]) -> Bounds {
        let numbers = limits.iter().map(|(o, wanted)| {
            let number = o.as_number()?;
            Some((NumberKey::new(number), is_shared(number), *wanted))
        });
        let strings = limits.iter().map(|(o, wanted)| {
            let key = StringKey::new(o.as_str()?);
            let shared = key.0.len() > STRING_KEY_BYTES;
            Some((key, shared, *wanted))
        });
        if let Some(edges) = numbers.collect::<Option<Vec<_>>>() {
            self.within(name, |f| &f.numbers, edges)
        } else if let Some(edges) = strings.collect::<Option<Vec<_>>>() {
            self.within(name, |f| &f.strings, edges)
        } else {
            // One value is not both a number and a string.
            Bounds::default()
        }
    }

    /// A key strictly beyond the operand's means a value beyond the operand, even where keys are shared; only of the
    /// values under a shared key itself nothing is known.
    fn within<K: Key>(&self, name: &str, values: Values<K>, edges: Vec<Edge<K>>) -> Bounds {
        let (mut from, mut to) = (Unbounded, Unbounded);
        let mut perhaps = RoaringBitmap::new();
        for (key, is_shared, wanted) in edges {
            if is_shared {
                perhaps |= self.value(name, values, key.clone(), true).may;
            }
            let edge = if wanted.contains(&Ordering::Equal) && !is_shared { Included(key) } else { Excluded(key) };
            if wanted.contains(&Ordering::Greater) { from = edge } else { to = edge }
        }
        let must = self.range(name, values, from, |key| match &to {
            Included(to) => key <= to,
            Excluded(to) => key < to,
            Unbounded => true,
        });
        Bounds::between(must, &perhaps)
    }

    fn prefix(&self, name: &str, prefix: &str) -> Bounds {
        let key = StringKey::new(prefix);
        let slots = self.range(name, |f| &f.strings, Included(key.clone()), |k| k.0.starts_with(&*key.0));
        if key.0.len() < prefix.len() { Bounds::between(RoaringBitmap::new(), &slots) } else { Bounds::exact(slots) }
    }

    /// The slots of a run of values. Each slice begins after the last key of the one before.
    fn range<K: Key>(
        &self,
        name: &str,
        values: Values<K>,
        mut from: Bound<K>,
        is_within: impl Fn(&K) -> bool,
    ) -> RoaringBitmap {
        let mut found = RoaringBitmap::new();
        let mut few = Vec::new();
        loop {
            let (mut last, mut united) = (None, RoaringBitmap::new());
            (self.look)(&mut |index| {
                let Some(field) = index.fields.get(name) else { return };
                let (mut work, mut many) = (0, Vec::new());
                for (key, posting) in values(field).range((from.as_ref(), Unbounded)).take_while(|(k, _)| is_within(k))
                {
                    posting.gather(&mut many, &mut few);
                    work += VALUE_WORK + posting.len();
                    if work >= SLICE_WORK_MAX {
                        last = Some(key.clone());
                        break;
                    }
                }
                // All at once: one after the other, what was found would be written anew with each.
                united = many.union();
            });
            found |= united;
            few.sort_unstable();
            found.extend(few.drain(..));
            match last {
                Some(key) => from = Excluded(key),
                None => return found,
            }
        }
    }

    fn set(&self, name: &str, set: fn(&Field) -> &Posting) -> RoaringBitmap {
        self.lend(|index| index.fields.get(name).map(|f| set(f).to_bitmap()).unwrap_or_default())
    }

    fn occupied(&self) -> RoaringBitmap {
        self.lend(|index| index.occupied.to_bitmap())
    }

    fn lend<T>(&self, read: impl Fn(&MetaIndex) -> T) -> T {
        let mut answer = None;
        (self.look)(&mut |index| answer = Some(read(index)));
        answer.expect("look lends the index")
    }
}

/// Where in a path the first name stands that filters also take as a position.
fn position(path: &[Box<str>]) -> Option<usize> {
    path.iter().position(|name| name.parse::<usize>().is_ok())
}

/// Whether values that differ from this operand have its key, which is a float.
fn is_shared(operand: &Number) -> bool {
    operand.as_f64().is_some_and(|f| f.abs() >= INTEGERS_EXACT_BELOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::cell::Cell;

    const NAMES: [&str; 8] = ["a", "b", "c", "0", "1", "+1", "a.b", ""];
    const PATHS: [&str; 12] = ["a", "b", "c", "a.b", "a.b.c", "a.a", "b.c", "a.0", "a.+1", "b.1.a", "1", "a.a.b.0.c"];

    fn long(tail: &str) -> String {
        "é".repeat(33) + tail
    }

    fn scalars() -> Vec<Value> {
        let mut all = vec![json!(null), json!(true), json!(false), json!(""), json!("a"), json!("ab"), json!("b")];
        all.extend([0, 1, 2, -1].map(Value::from));
        all.extend([0.0, -0.0, 0.5, 2.0, -1.5, 9_007_199_254_740_992.0, 1.844_674_407_370_955_2e19].map(Value::from));
        all.extend([9_007_199_254_740_991_u64, 9_007_199_254_740_992, 9_007_199_254_740_993].map(Value::from));
        all.extend([u64::MAX, u64::MAX - 1, u64::MAX - 5000].map(Value::from));
        all.extend([i64::MIN, i64::MIN + 1, -9_007_199_254_740_993].map(Value::from));
        all.extend(["", "a", "b"].map(|tail| Value::from(long(tail))));
        all.extend([64, 65, 66].map(|n| Value::from("x".repeat(n))));
        all
    }

    fn value() -> impl Strategy<Value = Value> + Clone {
        let scalar = proptest::sample::select(scalars());
        scalar.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(proptest::sample::select(&NAMES[..]), inner, 0..4)
                    .prop_map(|map| map.into_iter().map(|(name, v)| (name.to_owned(), v)).collect()),
            ]
        })
    }

    fn meta() -> impl Strategy<Value = VectorMeta> {
        let object = proptest::collection::btree_map(proptest::sample::select(&NAMES[..]), value(), 0..5);
        // Texts that `parse` takes for something else than it seems.
        let odd = vec![
            r#"{"a":1,"a":2}"#,
            r#"{"a":{"b":1},"a":{"c":1}}"#,
            r#"{"a":1,"b":1e999}"#,
            r#"{"$serde_json::private::RawValue":"[{\"a\":1}]"}"#,
        ];
        prop_oneof![
            20 => object.prop_map(|map| VectorMeta::new(&json!(map).to_string()).unwrap()),
            1 => proptest::sample::select(odd).prop_map(|text| VectorMeta::new(text).unwrap()),
        ]
    }

    fn condition() -> impl Strategy<Value = Value> + Clone {
        let operand = prop_oneof![4 => proptest::sample::select(scalars()), 1 => value()];
        let ordered: Vec<Value> = scalars().into_iter().filter(|v| v.is_number() || v.is_string()).collect();
        let ordered = proptest::sample::select(ordered);
        let strings: Vec<Value> = scalars().into_iter().filter(Value::is_string).collect();
        prop_oneof![
            operand.clone(),
            operand.clone().prop_map(|v| json!({"$eq": v})),
            operand.clone().prop_map(|v| json!({"$ne": v})),
            proptest::collection::vec(operand.clone(), 0..4).prop_map(|v| json!({"$in": v})),
            proptest::collection::vec(operand, 0..4).prop_map(|v| json!({"$nin": v})),
            (proptest::sample::select(&["$gt", "$gte", "$lt", "$lte"][..]), ordered.clone())
                .prop_map(|(name, v)| json!({name: v})),
            (
                proptest::sample::select(&["$gt", "$gte"][..]),
                ordered.clone(),
                proptest::sample::select(&["$lt", "$lte"][..]),
                ordered
            )
                .prop_map(|(low, a, high, b)| json!({low: a, high: b})),
            any::<bool>().prop_map(|v| json!({"$exists": v})),
            proptest::sample::select(strings).prop_map(|v| json!({"$prefix": v})),
        ]
    }

    fn filter() -> impl Strategy<Value = Value> {
        let condition = condition().prop_filter("plain objects that look like operators are refused", |v| {
            Filter::parse(&json!({"a": v})).is_ok()
        });
        let leaf = prop_oneof![
            8 => (proptest::sample::select(&PATHS[..]), condition.clone()).prop_map(|(path, c)| json!({path: c})),
            1 => (proptest::sample::select(&PATHS[..]), condition)
                .prop_filter("$not takes operators", |(_, c)| c.is_object())
                .prop_map(|(path, c)| json!({path: {"$not": c}})),
            1 => Just(json!({})),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            let list = proptest::collection::vec(inner.clone(), 1..4);
            prop_oneof![
                list.clone().prop_map(|all| json!({"$and": all})),
                list.prop_map(|any| json!({"$or": any})),
                inner.prop_map(|one| json!({"$not": one})),
            ]
        })
    }

    fn select_all(index: &MetaIndex, filter: &Filter) -> Selection {
        select(filter, &|read| read(index))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        /// A selection that lacks a slot would hide a vector; one that claims to be exact would show a wrong one.
        #[test]
        fn a_selection_holds_what_matches_and_an_exact_one_nothing_else(
            edits in proptest::collection::vec((0_u32..12, proptest::option::weighted(0.8, meta())), 0..40),
            filters in proptest::collection::vec(filter(), 1..12),
        ) {
            let mut index = MetaIndex::default();
            let mut metas = BTreeMap::new();
            for (slot, meta) in edits {
                if let Some(old) = metas.remove(&slot) {
                    index.remove(Slot(slot), &old);
                }
                if let Some(meta) = meta {
                    index.insert(Slot(slot), &meta);
                    metas.insert(slot, meta);
                }
            }
            for json in filters {
                let filter = Filter::parse(&json).unwrap();
                let found = select_all(&index, &filter);
                let expected: RoaringBitmap =
                    metas.iter().filter(|(_, m)| filter.matches(&m.parse())).map(|(slot, _)| *slot).collect();
                prop_assert!(expected.is_subset(&found.slots), "{json}: {expected:?} but {found:?}");
                prop_assert!(!found.is_exact || found.slots == expected, "{json}: {expected:?} but {found:?}");
                prop_assert!(found.slots.iter().all(|slot| metas.contains_key(&slot)), "{json}: a slot nobody is in");
            }
            for (slot, meta) in metas {
                index.remove(Slot(slot), &meta);
            }
            prop_assert!(index.fields.is_empty(), "left behind: {:?}", index.fields);
            prop_assert_eq!(index.memory_bytes(), MetaIndex::default().memory_bytes());
        }
    }

    /// If these became inexact, every search with a filter would parse metadata again.
    #[test]
    fn plain_filters_are_exact() {
        let metas = [
            json!({"lang": "es", "year": 2020, "tags": ["a", "b"], "who": {"age": 7}, "text": "x".repeat(100)}),
            json!({"lang": "en", "year": 2021.5, "tags": ["b"], "ok": true, "who": null}),
            json!({"lang": "es", "big": 9_007_199_254_740_993_u64, "big_list": [1, 9], "roles": [{"id": 1}, {"id": 9}]}),
        ];
        let mut index = MetaIndex::default();
        for (slot, meta) in metas.iter().enumerate() {
            index.insert(Slot(slot as u32), &VectorMeta::new(&meta.to_string()).unwrap());
        }
        for (filter, slots, is_exact) in [
            (json!({}), vec![0, 1, 2], true),
            (json!({"lang": "es"}), vec![0, 2], true),
            (json!({"year": {"$gte": 2020, "$lt": 2021}}), vec![0], true),
            (json!({"year": {"$gt": 2020, "$lte": 1000}}), vec![], true),
            (json!({"big_list": {"$gt": 3, "$lt": 5}}), vec![2], true),
            (json!({"roles.id": {"$gt": 3, "$lt": 5}}), vec![2], true),
            (json!({"$or": [{"lang": "es"}, {"text": "x".repeat(90)}]}), vec![0, 2], true),
            (json!({"tags": {"$in": ["a", "x"]}, "who.age": 7}), vec![0], true),
            (json!({"who": null}), vec![1, 2], true),
            (json!({"who": {"$ne": null}}), vec![0], true),
            (json!({"ok": {"$exists": false}}), vec![0, 2], true),
            (json!({"text": {"$prefix": "xx"}}), vec![0], true),
            (json!({"text": "x".repeat(90)}), vec![0], false),
            (json!({"text": {"$ne": "x".repeat(90)}}), vec![0, 1, 2], false),
            (json!({"big": 9_007_199_254_740_992_u64}), vec![2], false),
            (json!({"big": {"$gt": 9_007_199_254_740_000_u64}}), vec![2], true),
            (json!({"tags.1": "b"}), vec![0, 1], false),
            (json!({"tags": ["b"]}), vec![0, 1], false),
        ] {
            let found = select_all(&index, &Filter::parse(&filter).unwrap());
            assert_eq!((found.slots.iter().collect::<Vec<_>>(), found.is_exact), (slots, is_exact), "{filter}");
        }
    }

    /// Otherwise a range over many values would stop the writer for as long as it takes.
    #[test]
    fn a_range_lets_go_of_the_index_between_slices() {
        let mut index = MetaIndex::default();
        let meta = |n: u32| VectorMeta::new(&json!({"at": n, "name": format!("n{n}"), "all": 1}).to_string()).unwrap();
        for n in 0..5000 {
            index.insert(Slot(n), &meta(n));
        }
        for (filter, expected, looks) in [
            (json!({"at": {"$gte": 100}}), 100..5000, 5..9),
            (json!({"name": {"$prefix": "n"}}), 0..5000, 5..9),
            (json!({"at": {"$gte": 100, "$lt": 200}}), 100..200, 1..4),
            (json!({"all": 1}), 0..5000, 1..2),
        ] {
            let count = Cell::new(0);
            let found = select(&Filter::parse(&filter).unwrap(), &|read| {
                count.set(count.get() + 1);
                read(&index);
            });
            assert!(found.is_exact && found.slots == expected.collect(), "{filter}");
            assert!(looks.contains(&count.get()), "{filter}: {} looks", count.get());
        }
        for n in 0..5000 {
            index.remove(Slot(n), &meta(n));
        }
        assert!(index.fields.is_empty());
        assert_eq!(index.memory_bytes(), MetaIndex::default().memory_bytes());
    }

    /// With values of three slots and fewer, of some, of very many, and of more than one slice may hold; in several containers.
    #[test]
    fn a_range_over_values_of_many_slots_finds_all_of_them() {
        const SLOTS: u32 = 150_000;
        let value = |slot: u32| match slot % 5 {
            // Two fifths of all have one value; then come 97 of 309 slots, 500 of 60, and one for each of the others.
            0 | 1 => 0,
            2 => 1 + slot % 97,
            3 => 200 + slot / 300,
            _ => 10_000 + slot,
        };
        let mut index = MetaIndex::default();
        for slot in 0..SLOTS {
            index.insert(Slot(slot), &VectorMeta::new(&json!({"n": value(slot)}).to_string()).unwrap());
        }
        for (from, to) in [(0, u32::MAX), (0, 1), (1, 98), (1, 10_000), (50, 500), (200, 20_000), (9999, u32::MAX)] {
            let found = select_all(&index, &Filter::parse(&json!({"n": {"$gte": from, "$lt": to}})).unwrap());
            let expected: RoaringBitmap = (0..SLOTS).filter(|&slot| (from..to).contains(&value(slot))).collect();
            assert!(found.is_exact && found.slots == expected, "{from}..{to}: {} found", found.slots.len());
        }
    }

    /// Two words for most values: they are most of the index.
    #[test]
    fn a_posting_is_small() {
        assert_eq!(size_of::<Posting>(), 16);
    }
}
