//! JSON text as it is stored: checked, compacted, merged, and never re-parsed into numbers.
//!
//! A stored value is kept as text so that number literals come back as they were sent and serving it costs a copy.
//! A merge patch (RFC 7396) works on that text too: only the objects the patch descends into are taken apart.
//!
//! - Stored text has no white space outside strings, so it fits one SSE `data:` line.
//! - Nesting is bounded by [`DEPTH_MAX`] before anything recurses over it.

use crate::error::Rejection;
use memchr::{memchr, memchr2, memchr2_iter};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// The media type of nearly every body and answer.
pub const JSON: &str = "application/json";
/// How deep JSON may nest in a request. Bounds recursion in readers and in [`merge_patch`].
pub const DEPTH_MAX: usize = 128;
/// How deep what is stored may nest, by whatever route it comes: there is an object around it wherever it is told.
pub const VALUE_DEPTH_MAX: usize = DEPTH_MAX - 1;

/// A field that was given, be it null: a plain `Option` would take null for absent.
pub fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Refuses a value, data or metadata nested deeper than [`VALUE_DEPTH_MAX`].
pub fn check_value_depth(text: &str) -> Result<(), Rejection> {
    check_depth(text.as_bytes(), VALUE_DEPTH_MAX)
}

/// Refuses text nested deeper than `most`. Looks at brackets outside strings only; O(n).
pub fn check_depth(text: &[u8], most: usize) -> Result<(), Rejection> {
    // Nearly all text opens fewer brackets, in strings or not.
    if text.len() <= most || memchr2_iter(b'[', b'{', text).nth(most).is_none() {
        return Ok(());
    }
    let mut depth = 0usize;
    let mut at = 0;
    while at < text.len() {
        // A vector is kilobytes without a bracket or quote: passed over a block at a time.
        while let Some(block) = text[at..].first_chunk::<32>()
            && !block.iter().fold(false, |any, &byte| any | is_structure(byte))
        {
            at += block.len();
        }
        let Some(&byte) = text.get(at) else { break };
        match byte {
            b'"' => at = skip_string(text, at),
            b'[' | b'{' => {
                depth += 1;
                if depth > most {
                    return Err(Rejection::invalid(format!("JSON may nest at most {most} deep here")));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

/// A quote or a bracket of either kind.
#[inline]
fn is_structure(byte: u8) -> bool {
    byte == b'"' || byte | 0x20 == b'{' || byte | 0x20 == b'}'
}

/// Whether text that is no JSON names what is no number there, `NaN` or `Infinity`, as many languages write it.
#[must_use]
pub fn names_no_number(text: &[u8]) -> bool {
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'"' => at = skip_string(text, at),
            _ if [&b"NaN"[..], b"Infinity"].iter().any(|word| text[at..].starts_with(word)) => return true,
            _ => {}
        }
        at += 1;
    }
    false
}

/// Refuses `\\u` escapes of half a surrogate pair: such text is no Unicode, so nothing could merge or compare it later.
pub fn check_surrogates(text: &[u8]) -> Result<(), Rejection> {
    let unit_at = |at: usize| {
        let digits = text.get(at..at + 6).filter(|t| t.starts_with(b"\\u"))?;
        u16::from_str_radix(std::str::from_utf8(&digits[2..]).ok()?, 16).ok()
    };
    let mut at = 0;
    while let Some(found) = memchr(b'\\', &text[at..]) {
        at += found;
        match unit_at(at) {
            Some(0xD800..=0xDBFF) if matches!(unit_at(at + 6), Some(0xDC00..=0xDFFF)) => at += 12,
            Some(0xD800..=0xDFFF) => {
                return Err(Rejection::invalid("a string holds half of a surrogate pair (\\ud800 to \\udfff)"));
            }
            Some(_) => at += 6,
            None => at += 2,
        }
        if at >= text.len() {
            break;
        }
    }
    Ok(())
}

/// Index of the closing quote of the string that opens at `at` (or the last byte when it never closes).
fn skip_string(text: &[u8], at: usize) -> usize {
    let mut from = at + 1;
    while let Some(found) = text.get(from..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        if text[from + found] == b'"' {
            return from + found;
        }
        // Whatever is escaped does not count.
        from += found + 2;
    }
    text.len() - 1
}

/// The same JSON without white space outside strings. `text` must be valid JSON; O(n).
#[must_use]
pub fn compact(text: &str) -> String {
    let bytes = text.as_bytes();
    // A block at a time, and all four comparisons of a byte: the compiler makes a few instructions of a block.
    let is_space = |b: u8| (b == b' ') | (b == b'\n') | (b == b'\r') | (b == b'\t');
    let (blocks, rest) = bytes.as_chunks::<16>();
    let is_spaced = |block: &[u8; 16]| block.iter().fold(false, |any, &byte| any | is_space(byte));
    if !blocks.iter().any(is_spaced) && !rest.iter().any(|&byte| is_space(byte)) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        if is_space(bytes[at]) {
            at += 1;
            continue;
        }
        let start = at;
        while at < bytes.len() && !is_space(bytes[at]) {
            if bytes[at] == b'"' {
                at = skip_string(bytes, at);
            }
            at += 1;
        }
        // White space and quotes are ASCII, so both ends are character boundaries.
        out.push_str(&text[start..at]);
    }
    out
}

/// Containers of fewer bytes are read again rather than remembered.
const SMALL_CONTAINER_BYTES: usize = 64;

/// Compact JSON, and where its larger containers end: what is nested in an object is passed over without being read, so that going
/// down a path of objects costs their members, and not all that is below them at each step.
struct Nested<'a> {
    text: &'a str,
    /// First and last byte, in the order of the first.
    containers: Vec<(usize, usize)>,
}

/// Members of an object in order, with where their values begin, and where each name stands; a repeated name keeps its last value, as
/// parsers do.
#[derive(Default)]
struct Members<'a> {
    list: Vec<(Cow<'a, str>, usize)>,
    places: HashMap<Cow<'a, str>, usize>,
}

impl<'a> Nested<'a> {
    fn new(text: &'a str) -> Self {
        let bytes = text.as_bytes();
        let mut containers = Vec::new();
        let mut open = Vec::new();
        let mut at = 0;
        while let Some(found) = bytes[at..].iter().position(|&byte| is_structure(byte)) {
            at += found;
            match bytes[at] {
                b'"' => at = skip_string(bytes, at),
                b'{' | b'[' => {
                    open.push(containers.len());
                    containers.push((at, at));
                }
                _ => {
                    let Some(place) = open.pop() else { break };
                    containers[place].1 = at;
                    // What lies in a small one is small, and gone.
                    if at - containers[place].0 < SMALL_CONTAINER_BYTES {
                        containers.truncate(place);
                    }
                }
            }
            at += 1;
        }
        Self { text, containers }
    }

    fn byte(&self, at: usize) -> u8 {
        self.text.as_bytes().get(at).copied().unwrap_or_default()
    }

    /// Behind the value that begins at `at`.
    fn end(&self, at: usize) -> usize {
        let bytes = self.text.as_bytes();
        match self.byte(at) {
            b'"' => skip_string(bytes, at) + 1,
            b'{' | b'[' => match self.containers.binary_search_by_key(&at, |container| container.0) {
                Ok(place) => self.containers[place].1 + 1,
                Err(_) => end_of_container(bytes, at),
            },
            _ => {
                bytes[at..].iter().position(|b| matches!(b, b',' | b'}' | b']')).map_or(bytes.len(), |count| at + count)
            }
        }
    }

    fn value(&self, at: usize) -> &'a str {
        &self.text[at..self.end(at)]
    }

    fn is_object(&self, at: usize) -> bool {
        self.byte(at) == b'{'
    }

    fn is_null(&self, at: usize) -> bool {
        self.byte(at) == b'n'
    }

    /// Of the object that begins at `at`.
    fn members(&self, at: usize) -> Result<Members<'a>, Rejection> {
        let mut members = Members::default();
        let mut at = at + 1;
        while self.byte(at) == b'"' {
            let end = self.end(at);
            let name = name(&self.text[at..end])?;
            // Behind the colon.
            let value = end + 1;
            match members.places.entry(name.clone()) {
                Entry::Occupied(place) => members.list[*place.get()].1 = value,
                Entry::Vacant(free) => {
                    free.insert(members.list.len());
                    members.list.push((name, value));
                }
            }
            at = self.end(value) + usize::from(self.byte(self.end(value)) == b',');
        }
        Ok(members)
    }
}

/// A member's name, as it is meant.
fn name(literal: &str) -> Result<Cow<'_, str>, Rejection> {
    if !literal.contains('\\') {
        return Ok(Cow::Borrowed(&literal[1..literal.len() - 1]));
    }
    let name = serde_json::from_str(literal).map(Cow::Owned);
    name.map_err(|e| Rejection::invalid(format!("JSON object cannot be merged: {e}")))
}

/// Behind the object or list that begins at `at`.
fn end_of_container(bytes: &[u8], at: usize) -> usize {
    let (mut at, mut depth) = (at, 0_usize);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = skip_string(bytes, at),
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth <= 1 => return at + 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// Applies a JSON merge patch (RFC 7396) to `target` (`None` = absent); both compact and valid, and so is the result.
///
/// Members the patch does not touch keep their text, so their number literals stay as they were sent. Cost: O(size of both), however
/// deep they are. Errors only on member names that are not Unicode.
pub fn merge_patch(target: Option<&str>, patch: &str) -> Result<String, Rejection> {
    let target = target.map(Nested::new);
    let patch = Nested::new(patch);
    let mut out = String::with_capacity(target.as_ref().map_or(0, |target| target.text.len()) + patch.text.len());
    merge(&mut out, target.as_ref().map(|target| (target, 0)), &patch, 0)?;
    Ok(out)
}

/// Appends what the patch's value at `at` makes of the target's at its place.
fn merge(
    out: &mut String,
    target: Option<(&Nested<'_>, usize)>,
    patch: &Nested<'_>,
    at: usize,
) -> Result<(), Rejection> {
    if !patch.is_object(at) {
        out.push_str(patch.value(at));
        return Ok(());
    }
    let target = target.filter(|(target, at)| target.is_object(*at));
    let Members { list, places } = target.map_or_else(|| Ok(Members::default()), |(target, at)| target.members(at))?;
    // By member of the target, and those it does not have.
    let mut changes = vec![None; list.len()];
    let mut added = Vec::new();
    for (name, value) in patch.members(at)?.list {
        match places.get(&name) {
            Some(&place) => changes[place] = Some(value),
            None => added.push((name, value)),
        }
    }
    let begin_member = |out: &mut String, name: &str| {
        if !out.ends_with('{') {
            out.push(',');
        }
        push_string(out, name);
        out.push(':');
    };
    out.push('{');
    for ((name, old), change) in list.iter().zip(changes) {
        match (change, target) {
            (Some(new), _) if patch.is_null(new) => {}
            (Some(new), Some((target, _))) => {
                begin_member(out, name);
                merge(out, Some((target, *old)), patch, new)?;
            }
            (_, target) => {
                begin_member(out, name);
                out.push_str(target.map_or("null", |(target, _)| target.value(*old)));
            }
        }
    }
    for (name, new) in added {
        if !patch.is_null(new) {
            begin_member(out, &name);
            merge(out, None, patch, new)?;
        }
    }
    out.push('}');
    Ok(())
}

/// Appends `text` as a JSON string literal.
pub fn push_string(out: &mut String, text: &str) {
    out.push('"');
    let mut plain_from = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape: &str = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            b'\n' => "\\n",
            b'\r' => "\\r",
            b'\t' => "\\t",
            0..=0x1f => "",
            _ => continue,
        };
        out.push_str(&text[plain_from..at]);
        if escape.is_empty() {
            out.push_str(&format!("\\u{byte:04x}"));
        } else {
            out.push_str(escape);
        }
        plain_from = at + 1;
    }
    out.push_str(&text[plain_from..]);
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Just, Strategy, prop_assert, prop_assert_eq, prop_oneof, proptest};
    use serde_json::{Map, Value};

    #[test]
    fn merge_patch_follows_rfc_7396_appendix_a() {
        for (target, patch, expected) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, r#"{}"#),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"["a","b"]"#, r#"["c","d"]"#, r#"["c","d"]"#),
            (r#"{"a":"b"}"#, r#"["c"]"#, r#"["c"]"#),
            (r#"{"a":"foo"}"#, "null", "null"),
            (r#"{"a":"foo"}"#, r#""bar""#, r#""bar""#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"e":null,"a":1}"#),
            ("[1,2]", r#"{"a":"b","c":null}"#, r#"{"a":"b"}"#),
            ("{}", r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
            // Ours: names compare after unescaping; literals nobody touched stay as they are.
            (r#"{"\u0061":1.0,"n":1e400}"#, r#"{"a":2.50}"#, r#"{"a":2.50,"n":1e400}"#),
            (r#"{"a":1}"#, r#"{"a":null,"a":{"x":1}}"#, r#"{"a":{"x":1}}"#),
            (r#"{"a":{"x":1},"b":0,"a":{"y":2}}"#, r#"{"a":{"z":3}}"#, r#"{"a":{"y":2,"z":3},"b":0}"#),
        ] {
            assert_eq!(merge_patch(Some(target), patch).unwrap(), expected, "{target} + {patch}");
        }
        assert_eq!(merge_patch(None, r#"{"a":{"b":null,"c":1}}"#).unwrap(), r#"{"a":{"c":1}}"#);
    }

    #[test]
    fn half_a_surrogate_pair_is_refused() {
        for (text, ok) in [
            (r#""\ud83d\ude00""#, true),
            (r#""\ud83d""#, false),
            (r#""\ude00""#, false),
            (r#""\ud83dx\ude00""#, false),
            (r#""\\ud83d""#, true),
            (r#""\u00e9\n""#, true),
            ("\"\\", true),
        ] {
            assert_eq!(check_surrogates(text.as_bytes()).is_ok(), ok, "{text}");
        }
    }

    #[test]
    fn compact_leaves_strings_alone() {
        assert_eq!(compact(" { \"a b\" : [ 1 , \"\\\" x\" ] }\n"), r#"{"a b":[1,"\" x"]}"#);
    }

    #[test]
    fn what_is_no_number_is_seen_outside_strings() {
        assert!(names_no_number(b"{\"a\":[1,NaN]}") && names_no_number(b"[-Infinity]"));
        assert!(!names_no_number(b"{\"NaN\":[1E5,None,\"\\\"Infinity\"") && !names_no_number(b"\"NaN"));
    }

    #[test]
    fn depth_counts_brackets_outside_strings() {
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        for most in [VALUE_DEPTH_MAX, DEPTH_MAX] {
            assert!(check_depth(nested(most).as_bytes(), most).is_ok());
            assert!(check_depth(nested(most + 1).as_bytes(), most).is_err());
        }
        assert!(check_depth(format!("\"{}\"", "[".repeat(500)).as_bytes(), DEPTH_MAX).is_ok());
        assert!(check_depth(b"\"\\", DEPTH_MAX).is_ok(), "an unclosed string must not run past the end");
    }

    #[test]
    fn deepest_allowed_patch_merges() {
        let deep = |leaf: &str| format!("{}{leaf}{}", "{\"a\":".repeat(DEPTH_MAX), "}".repeat(DEPTH_MAX));
        assert_eq!(merge_patch(Some(&deep("1")), &deep("2")).unwrap(), deep("2"));
    }

    /// As the RFC's own few lines of pseudocode have it.
    fn by_the_book(target: Value, patch: &Value) -> Value {
        let Value::Object(patch) = patch else { return patch.clone() };
        let mut merged = if let Value::Object(members) = target { members } else { Map::new() };
        for (name, value) in patch {
            if value.is_null() {
                merged.remove(name);
            } else {
                let old = merged.remove(name).unwrap_or_default();
                merged.insert(name.clone(), by_the_book(old, value));
            }
        }
        Value::Object(merged)
    }

    fn value() -> impl Strategy<Value = Value> {
        // Some longer than what is remembered, some that look like structure.
        let text = prop_oneof!["[a-c]", "[\\[\\]{},:\"\\\\\n\u{e9}]{0,8}", "[a-z]{70}"];
        let leaf = prop_oneof![Just(Value::Null), (0..3_i32).prop_map(Value::from), text.clone().prop_map(Value::from)];
        leaf.prop_recursive(5, 40, 6, move |inner| {
            let members = proptest::collection::vec((text.clone(), inner.clone()), 0..6);
            prop_oneof![
                proptest::collection::vec(inner, 0..4).prop_map(Value::from),
                members.prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_merge_is_the_books(target in value(), patch in value()) {
            let merged = merge_patch(Some(&target.to_string()), &patch.to_string()).unwrap();
            prop_assert_eq!(serde_json::from_str::<Value>(&merged).unwrap(), by_the_book(target, &patch));
            prop_assert_eq!(compact(&merged), merged);
        }

        #[test]
        fn what_is_passed_over_ends_where_it_would_when_read(value in value()) {
            let text = value.to_string();
            let nested = Nested::new(&text);
            for &(at, last) in &nested.containers {
                prop_assert!(last - at >= SMALL_CONTAINER_BYTES);
                prop_assert_eq!(nested.end(at), end_of_container(text.as_bytes(), at));
            }
            prop_assert_eq!(nested.end(0), text.len());
        }
    }

    #[test]
    fn strings_escape_as_serde_json_reads_them() {
        let text = "a\"b\\c\nd\te\u{1}f\u{e9}\u{2028}";
        let mut out = String::new();
        push_string(&mut out, text);
        assert_eq!(serde_json::from_str::<String>(&out).unwrap(), text);
    }
}
