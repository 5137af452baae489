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
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

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

/// Members of an object in order, values as text, and where each name stands; a repeated name keeps its last value, as parsers do.
#[derive(Default)]
struct Members<'a> {
    list: Vec<(Cow<'a, str>, &'a RawValue)>,
    places: HashMap<Cow<'a, str>, usize>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Members::default();
                while let Some((name, value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    match members.places.entry(name.0.clone()) {
                        Entry::Occupied(place) => members.list[*place.get()].1 = value,
                        Entry::Vacant(free) => {
                            free.insert(members.list.len());
                            members.list.push((name.0, value));
                        }
                    }
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// A member name that borrows where it has no escapes (serde's own `Cow` always copies).
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

fn members(text: &str) -> Result<Members<'_>, Rejection> {
    // The streaming parser's own depth guard counts objects only as it enters them, one per call here.
    serde_json::from_str(text).map_err(|e| Rejection::invalid(format!("JSON object cannot be merged: {e}")))
}

fn is_object(text: &str) -> bool {
    text.starts_with('{')
}

/// Applies a JSON merge patch (RFC 7396) to `target` (`None` = absent); both compact, and so is the result.
///
/// Members the patch does not touch keep their text, so their number literals stay as they were sent. Cost: O(size of
/// the objects along the patch's path, once per level). Errors only on member names that are not Unicode.
pub fn merge_patch(target: Option<&str>, patch: &str) -> Result<String, Rejection> {
    if !is_object(patch) {
        return Ok(patch.to_owned());
    }
    let patch = members(patch)?.list;
    let Members { list, mut places } = match target {
        Some(target) if is_object(target) => members(target)?,
        _ => Members::default(),
    };
    let mut merged: Vec<(Cow<'_, str>, Cow<'_, str>)> =
        list.into_iter().map(|(name, value)| (name, Cow::Borrowed(value.get()))).collect();
    let mut removed = vec![false; merged.len()];
    for (name, value) in patch {
        let value = value.get();
        let at = places.get(&name).copied();
        if value == "null" {
            if let Some(at) = at {
                removed[at] = true;
            }
            continue;
        }
        let old = at.filter(|&at| !removed[at]).map(|at| merged[at].1.clone());
        let new = Cow::Owned(merge_patch(old.as_deref(), value)?);
        if let Some(at) = at {
            merged[at].1 = new;
            removed[at] = false;
        } else {
            places.insert(name.clone(), merged.len());
            merged.push((name, new));
            removed.push(false);
        }
    }
    let mut out = String::from("{");
    for (at, (name, value)) in merged.iter().enumerate() {
        if removed[at] {
            continue;
        }
        if out.len() > 1 {
            out.push(',');
        }
        push_string(&mut out, name);
        out.push(':');
        out.push_str(value);
    }
    out.push('}');
    Ok(out)
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

    #[test]
    fn strings_escape_as_serde_json_reads_them() {
        let text = "a\"b\\c\nd\te\u{1}f\u{e9}\u{2028}";
        let mut out = String::new();
        push_string(&mut out, text);
        assert_eq!(serde_json::from_str::<String>(&out).unwrap(), text);
    }
}
