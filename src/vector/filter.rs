//! Filters over metadata, Mongo style: parsed once into a bounded tree, then evaluated on a parsed metadata object.
//!
//! - A path (`"a.b"`) descends into objects; through an array it means any of its elements, or one by index (`"a.0"`).
//! - A condition holds when any value at the path satisfies it; on an array also when any element does.
//! - `$ne` and `$nin` are the negations of `$eq` and `$in`: they hold for what has no such field.
//! - Equality with `null` holds for null and for an absent field, as in MongoDB.
//! - Order compares numbers with numbers and strings with strings (by bytes); other pairs never hold.

use crate::error::Rejection;
use serde_json::{Map, Value};
use smallvec::SmallVec;
use std::cmp::Ordering;
use std::collections::HashSet;

/// How deep `$and`, `$or`, `$not` may nest: bounds recursion.
pub const FILTER_DEPTH_MAX: usize = 16;
/// Most conditions and list elements in one filter: bounds the cost for each vector looked at.
pub const FILTER_NODES_MAX: usize = 1024;
/// Most names in a dotted path.
pub const PATH_NAMES_MAX: usize = 16;

/// A parsed filter.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter(Node);

/// Seen by the metadata index too, which evaluates the same tree on sets of slots.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    All(Vec<Node>),
    Any(Vec<Node>),
    Not(Box<Node>),
    Field(Vec<Box<str>>, Test),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Test {
    Eq(Value),
    In(Operands),
    Order(Value, &'static [Ordering]),
    Exists,
    Prefix(Box<str>),
}

/// What `$in` lists. Numbers, strings and the like are looked up at once, however many there are.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Operands {
    /// As given.
    pub(super) all: Vec<Value>,
    plain: HashSet<Plain>,
    /// Arrays and objects.
    others: Vec<Value>,
}

/// A value by which values that are [`equal`] are the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Plain {
    Null,
    Bool(bool),
    Whole(i128),
    /// The bits of a number that is not whole, or beyond what [`integer`] tells.
    Float(u64),
    String(Box<str>),
}

impl Plain {
    fn of(value: &Value) -> Option<Self> {
        Some(match value {
            Value::Null => Self::Null,
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => match integer(number) {
                Some(whole) => Self::Whole(whole),
                None => Self::Float(number.as_f64()?.to_bits()),
            },
            Value::String(text) => Self::String(text.as_str().into()),
            Value::Array(_) | Value::Object(_) => return None,
        })
    }
}

impl Operands {
    fn new(all: Vec<Value>) -> Self {
        let plain = all.iter().filter_map(Plain::of).collect();
        let others = all.iter().filter(|value| value.is_array() || value.is_object()).cloned().collect();
        Self { all, plain, others }
    }

    fn contains(&self, value: &Value) -> bool {
        Plain::of(value).is_some_and(|plain| self.plain.contains(&plain)) || self.others.iter().any(|o| equal(value, o))
    }
}

impl Filter {
    /// Parses and checks: unknown operators, wrong operand types and oversized filters are refused.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let mut budget = FILTER_NODES_MAX;
        parse_filter(value, 0, &mut budget).map(Self)
    }

    /// Whether an index over values can answer it: no positions in arrays, no whole objects or arrays, no long strings.
    #[must_use]
    pub fn is_indexable(&self) -> bool {
        fn is_plain(value: &Value) -> bool {
            match value {
                Value::Array(_) | Value::Object(_) => false,
                Value::String(text) => text.len() <= super::meta_index::STRING_KEY_BYTES,
                _ => true,
            }
        }
        fn check(node: &Node) -> bool {
            match node {
                Node::All(nodes) | Node::Any(nodes) => nodes.iter().all(check),
                Node::Not(node) => check(node),
                Node::Field(path, test) => {
                    path.iter().all(|name| name.parse::<usize>().is_err())
                        && match test {
                            Test::Eq(value) | Test::Order(value, _) => is_plain(value),
                            Test::In(values) => values.all.iter().all(is_plain),
                            Test::Exists => true,
                            Test::Prefix(prefix) => prefix.len() <= super::meta_index::STRING_KEY_BYTES,
                        }
                }
            }
        }
        check(&self.0)
    }

    /// Whether a metadata object satisfies it.
    #[must_use]
    pub fn matches(&self, meta: &Value) -> bool {
        holds(&self.0, meta)
    }

    /// Values it may compare each value of a metadata object with.
    #[must_use]
    pub fn conditions(&self) -> usize {
        fn count(node: &Node) -> usize {
            match node {
                Node::All(nodes) | Node::Any(nodes) => nodes.iter().map(count).sum(),
                Node::Not(node) => count(node),
                Node::Field(_, Test::In(operands)) => 1 + operands.others.len(),
                Node::Field(..) => 1,
            }
        }
        count(&self.0)
    }

    pub(super) fn root(&self) -> &Node {
        &self.0
    }
}

fn spend(budget: &mut usize, n: usize) -> Result<(), Rejection> {
    *budget = budget.checked_sub(n).ok_or_else(|| {
        Rejection::invalid(format!("a filter has at most {FILTER_NODES_MAX} conditions and list elements"))
    })?;
    Ok(())
}

fn object<'a>(value: &'a Value, what: &str) -> Result<&'a Map<String, Value>, Rejection> {
    value.as_object().ok_or_else(|| Rejection::invalid(format!("{what} is an object such as {{\"lang\":\"es\"}}")))
}

fn parse_filter(value: &Value, depth: usize, budget: &mut usize) -> Result<Node, Rejection> {
    if depth > FILTER_DEPTH_MAX {
        return Err(Rejection::invalid(format!("filters nest at most {FILTER_DEPTH_MAX} deep")));
    }
    let mut all = Vec::new();
    for (name, operand) in object(value, "a filter")? {
        spend(budget, 1)?;
        match name.as_str() {
            "$and" | "$or" => {
                let list = operand
                    .as_array()
                    .filter(|list| !list.is_empty())
                    .ok_or_else(|| Rejection::invalid(format!("{name} takes a non-empty array of filters")))?;
                let nodes: Result<Vec<_>, _> = list.iter().map(|f| parse_filter(f, depth + 1, budget)).collect();
                all.push(if name == "$and" { Node::All(nodes?) } else { Node::Any(nodes?) });
            }
            "$not" => all.push(Node::Not(Box::new(parse_filter(operand, depth + 1, budget)?))),
            _ if name.starts_with('$') => {
                return Err(Rejection::invalid(format!("unknown operator {name}; there are $and, $or, $not")));
            }
            path => all.push(parse_field(&parse_path(path)?, operand, depth + 1, budget)?),
        }
    }
    Ok(if all.len() == 1 { all.remove(0) } else { Node::All(all) })
}

/// Splits a dotted path; also used for `group_by`.
pub fn parse_path(path: &str) -> Result<Vec<Box<str>>, Rejection> {
    let names: Vec<Box<str>> = path.split('.').map(Into::into).collect();
    if names.len() > PATH_NAMES_MAX || names.iter().any(|n| n.is_empty()) {
        return Err(Rejection::invalid(format!(
            "{path:?} is not a field path: 1 to {PATH_NAMES_MAX} names with dots between"
        )));
    }
    Ok(names)
}

fn parse_field(path: &[Box<str>], operand: &Value, depth: usize, budget: &mut usize) -> Result<Node, Rejection> {
    if depth > FILTER_DEPTH_MAX + 1 {
        return Err(Rejection::invalid(format!("filters nest at most {FILTER_DEPTH_MAX} deep")));
    }
    let field = |test| Node::Field(path.to_vec(), test);
    let operators = match operand {
        Value::Object(map) if map.keys().any(|k| k.starts_with('$')) => map,
        literal if has_operator(literal) => {
            return Err(Rejection::invalid(format!(
                "an operator stands directly below a path: {{\"a.b\":{{\"$gt\":1}}}} rather than {{\"a\":{{\"b\":{{\"$gt\":1}}}}}}, at {:?}",
                path.join(".")
            )));
        }
        literal => return Ok(field(Test::Eq(literal.clone()))),
    };
    let list = |name: &str, operand: &Value, budget: &mut usize| -> Result<Vec<Value>, Rejection> {
        let list = operand.as_array().ok_or_else(|| Rejection::invalid(format!("{name} takes an array")))?;
        spend(budget, list.len())?;
        Ok(list.clone())
    };
    let mut all = Vec::new();
    for (name, operand) in operators {
        spend(budget, 1)?;
        all.push(match name.as_str() {
            "$eq" => field(Test::Eq(operand.clone())),
            "$ne" => Node::Not(Box::new(field(Test::Eq(operand.clone())))),
            "$in" => field(Test::In(Operands::new(list(name, operand, budget)?))),
            "$nin" => Node::Not(Box::new(field(Test::In(Operands::new(list(name, operand, budget)?))))),
            "$gt" | "$gte" | "$lt" | "$lte" => {
                if !operand.is_number() && !operand.is_string() {
                    return Err(Rejection::invalid(format!("{name} takes a number or a string")));
                }
                field(Test::Order(
                    operand.clone(),
                    match name.as_str() {
                        "$gt" => &[Ordering::Greater],
                        "$gte" => &[Ordering::Greater, Ordering::Equal],
                        "$lt" => &[Ordering::Less],
                        _ => &[Ordering::Less, Ordering::Equal],
                    },
                ))
            }
            "$exists" => match operand {
                Value::Bool(true) => field(Test::Exists),
                Value::Bool(false) => Node::Not(Box::new(field(Test::Exists))),
                _ => return Err(Rejection::invalid("$exists takes true or false")),
            },
            "$prefix" => field(Test::Prefix(
                operand.as_str().ok_or_else(|| Rejection::invalid("$prefix takes a string"))?.into(),
            )),
            "$not" => {
                if !operand.is_object() {
                    return Err(Rejection::invalid("$not takes an object of operators or a filter"));
                }
                Node::Not(Box::new(parse_field(path, operand, depth + 1, budget)?))
            }
            _ => {
                return Err(Rejection::invalid(format!(
                    "unknown operator {name}; there are $eq $ne $in $nin $gt $gte $lt $lte $exists $prefix $not"
                )));
            }
        });
    }
    Ok(if all.len() == 1 { all.remove(0) } else { Node::All(all) })
}

/// Whether an object in it has a name that only operators have.
fn has_operator(literal: &Value) -> bool {
    match literal {
        Value::Object(map) => map.iter().any(|(name, value)| name.starts_with('$') || has_operator(value)),
        Value::Array(list) => list.iter().any(has_operator),
        _ => false,
    }
}

fn holds(node: &Node, meta: &Value) -> bool {
    match node {
        Node::All(nodes) => nodes.iter().all(|n| holds(n, meta)),
        Node::Any(nodes) => nodes.iter().any(|n| holds(n, meta)),
        Node::Not(node) => !holds(node, meta),
        Node::Field(path, test) => {
            let mut found = false;
            let satisfied = any_at(meta, path, &mut |value| {
                found = true;
                test.holds(value)
            });
            satisfied || (test.wants_absent() && !found)
        }
    }
}

/// Calls `test` for each value at the path until one holds. Elements of arrays on the way are each followed.
pub fn any_at(value: &Value, path: &[Box<str>], test: &mut impl FnMut(&Value) -> bool) -> bool {
    any_from(value, path, 1, test)
}

/// The same for a value that was come to with the names at some places of the path, as bits, still to follow. A name may be a
/// position and a field at once: value by value, none is visited twice, whatever the path and however arrays nest.
fn any_from(value: &Value, path: &[Box<str>], places: u32, test: &mut impl FnMut(&Value) -> bool) -> bool {
    if places.is_power_of_two() {
        return any_from_one(value, path, places, test);
    }
    let end = 1 << path.len();
    if places & end != 0 && test(value) {
        return true;
    }
    let places = places & !end;
    let mut left = (0..path.len()).filter(|place| places & 1 << place != 0);
    match value {
        Value::Object(map) => left.any(|place| {
            let same = |&other: &usize| places & 1 << other != 0 && path[other] == path[place];
            // Those of one name go on together, with the first.
            (0..place).find(same).is_none()
                && map.get(&*path[place]).is_some_and(|value| {
                    let next = (place..path.len()).filter(same).fold(0, |next, place| next | 2 << place);
                    any_from(value, path, next, test)
                })
        }),
        Value::Array(list) if places != 0 => {
            let positions: SmallVec<[(usize, u32); 1]> =
                left.filter_map(|place| Some((path[place].parse().ok()?, 2 << place))).collect();
            list.iter().enumerate().any(|(at, element)| {
                let through = if element.is_object() { places } else { 0 };
                let next =
                    positions.iter().filter(|(position, _)| *position == at).fold(through, |next, (_, to)| next | to);
                next != 0 && any_from(element, path, next, test)
            })
        }
        _ => false,
    }
}

/// The same where one place is left, as nearly always.
fn any_from_one(value: &Value, path: &[Box<str>], place: u32, test: &mut impl FnMut(&Value) -> bool) -> bool {
    let Some(name) = path.get(place.trailing_zeros() as usize) else { return test(value) };
    match value {
        Value::Object(map) => map.get(&**name).is_some_and(|value| any_from_one(value, path, place << 1, test)),
        Value::Array(list) => {
            let position = name.parse::<usize>().ok();
            list.iter().enumerate().any(|(at, element)| {
                let next = if position == Some(at) { place << 1 } else { 0 };
                let next = if element.is_object() { next | place } else { next };
                next != 0 && any_from(element, path, next, test)
            })
        }
        _ => false,
    }
}

impl Test {
    /// Whether it holds where there is no such field.
    pub(super) fn wants_absent(&self) -> bool {
        match self {
            Self::Eq(operand) => operand.is_null(),
            Self::In(operands) => operands.plain.contains(&Plain::Null),
            _ => false,
        }
    }

    fn holds(&self, value: &Value) -> bool {
        let each = |one: &dyn Fn(&Value) -> bool| match value {
            Value::Array(list) => one(value) || list.iter().any(one),
            _ => one(value),
        };
        match self {
            Self::Exists => true,
            Self::Eq(operand) => each(&|v| equal(v, operand)),
            Self::In(operands) => each(&|v| operands.contains(v)),
            Self::Order(operand, wanted) => each(&|v| compare(v, operand).is_some_and(|o| wanted.contains(&o))),
            Self::Prefix(prefix) => each(&|v| v.as_str().is_some_and(|s| s.starts_with(&**prefix))),
        }
    }
}

/// Deep equality in which `1` equals `1.0`.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(_), Value::Number(_)) => compare(a, b) == Some(Ordering::Equal),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| equal(a, b)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(name, a)| y.get(name).is_some_and(|b| equal(a, b)))
        }
        _ => a == b,
    }
}

fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => match (integer(x), integer(y)) {
            (Some(x), Some(y)) => Some(x.cmp(&y)),
            _ => x.as_f64()?.partial_cmp(&y.as_f64()?),
        },
        (Value::String(x), Value::String(y)) => Some(x.as_bytes().cmp(y.as_bytes())),
        _ => None,
    }
}

/// A whole number, however it is written. Beyond 2^53 they must not compare equal only because they round to the same float.
pub(super) fn integer(number: &serde_json::Number) -> Option<i128> {
    /// All whole floats below fit.
    const FITS_BELOW: f64 = 1e38;
    let whole = || number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < FITS_BELOW);
    let integer = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
    // The cast: it has no fraction, and it fits.
    integer.or_else(|| whole().map(|float| float as i128))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// What a path means, said as plainly as it can be, however long that takes.
    fn values_at<'a>(value: &'a Value, path: &[Box<str>], found: &mut Vec<&'a Value>) {
        let Some((name, rest)) = path.split_first() else { return found.push(value) };
        match value {
            Value::Object(map) => map.get(&**name).into_iter().for_each(|value| values_at(value, rest, found)),
            Value::Array(list) => {
                let at = name.parse::<usize>().ok().and_then(|at| list.get(at));
                at.into_iter().for_each(|value| values_at(value, rest, found));
                list.iter().filter(|value| value.is_object()).for_each(|value| values_at(value, path, found));
            }
            _ => {}
        }
    }

    fn nested() -> impl Strategy<Value = Value> {
        let name = prop::sample::select(vec!["0", "1", "a"]);
        any::<u8>().prop_map(Value::from).prop_recursive(6, 40, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(name.clone().prop_map(str::to_owned), inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_path_leads_to_each_of_its_values_once(
            value in nested(), path in prop::collection::vec(prop::sample::select(vec!["0", "1", "a"]), 1..6),
        ) {
            let path: Vec<Box<str>> = path.into_iter().map(Into::into).collect();
            let mut expected = Vec::new();
            values_at(&value, &path, &mut expected);
            let mut expected: Vec<_> = expected.into_iter().map(std::ptr::from_ref).collect();
            expected.sort_unstable();
            expected.dedup();
            let mut found = Vec::new();
            any_at(&value, &path, &mut |value| {
                found.push(std::ptr::from_ref(value));
                false
            });
            found.sort_unstable();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_list_holds_what_equals_one_of_it(list in prop::collection::vec(nested(), 0..5), value in nested()) {
            let operands = Operands::new(list.clone());
            for value in list.iter().chain([&value, &json!(1.5), &json!(1), &json!(1.0), &json!(null), &json!("a")]) {
                prop_assert_eq!(operands.contains(value), list.iter().any(|one| equal(one, value)));
            }
        }
    }

    #[test]
    fn a_path_of_positions_does_not_fan_out() {
        let mut value = json!(1);
        for _ in 0..30 {
            value = json!([{ "0": value }]);
        }
        let path = vec![Box::from("0"); PATH_NAMES_MAX];
        let mut seen = 0;
        any_at(&value, &path, &mut |_| {
            seen += 1;
            false
        });
        assert!(seen <= PATH_NAMES_MAX + 1, "{seen} values of a path that has {PATH_NAMES_MAX}");
    }

    #[test]
    fn filters_match_as_a_user_of_mongo_expects() {
        let meta = json!({
            "lang": "es", "year": 2020, "score": 1.5, "ok": true, "none": null, "tags": ["a", "b"],
            "big": 9_007_199_254_740_993_u64, "who": {"name": "ann", "roles": [{"id": 1}, {"id": 2}]}
        });
        for (filter, expected) in [
            (json!({}), true),
            (json!({"lang": "es"}), true),
            (json!({"lang": "en"}), false),
            (json!({"lang": "es", "year": 2021}), false),
            (json!({"year": 2020.0}), true),
            (json!({"big": 9_007_199_254_740_992_u64}), false),
            (json!({"big": 9_007_199_254_740_992.0}), false),
            (json!({"big": {"$gt": 9_007_199_254_740_992.0}}), true),
            (json!({"big": {"$lt": 1e300}}), true),
            (json!({"tags": "a"}), true),
            (json!({"tags": ["a", "b"]}), true),
            (json!({"tags": ["b", "a"]}), false),
            (json!({"tags": {"$in": ["x", "b"]}}), true),
            (json!({"tags": {"$nin": ["x", "b"]}}), false),
            (json!({"tags": {"$ne": "a"}}), false),
            (json!({"tags.1": "b"}), true),
            (json!({"year": {"$gte": 2020, "$lt": 2021}}), true),
            (json!({"year": {"$gt": 2020}}), false),
            (json!({"year": {"$gt": "2019"}}), false),
            (json!({"lang": {"$gt": "en"}}), true),
            (json!({"lang": {"$prefix": "e"}}), true),
            (json!({"year": {"$prefix": "2"}}), false),
            (json!({"absent": {"$exists": false}}), true),
            (json!({"none": {"$exists": true}}), true),
            (json!({"none": null}), true),
            (json!({"absent": null}), true),
            (json!({"absent": {"$ne": 1}}), true),
            (json!({"absent": {"$gt": 1}}), false),
            (json!({"who.name": "ann"}), true),
            (json!({"who.roles.id": 2}), true),
            (json!({"who.roles.id": 3}), false),
            (json!({"who": {"name": "ann"}}), false),
            (json!({"$or": [{"lang": "en"}, {"year": {"$lte": 2020}}]}), true),
            (json!({"$and": [{"lang": "es"}, {"ok": false}]}), false),
            (json!({"$not": {"lang": "es"}}), false),
            (json!({"year": {"$not": {"$gt": 2020}}}), true),
        ] {
            assert_eq!(Filter::parse(&filter).unwrap().matches(&meta), expected, "{filter}");
        }
    }

    #[test]
    fn what_is_not_a_filter_is_refused() {
        let mut deep = json!({"a": 1});
        for _ in 0..FILTER_DEPTH_MAX + 1 {
            deep = json!({"$not": deep});
        }
        for bad in [
            json!(1),
            json!([]),
            json!({"$nor": []}),
            json!({"a": {"$regex": "x"}}),
            json!({"a": {"$gt": null}}),
            json!({"a": {"$in": 1}}),
            json!({"a": {"$exists": 1}}),
            json!({"a": {"$eq": 1, "plain": 2}}),
            json!({"$or": []}),
            json!({"a..b": 1}),
            json!({"": 1}),
            deep,
            json!({"a": {"$in": vec![1; FILTER_NODES_MAX + 1]}}),
        ] {
            assert!(Filter::parse(&bad).is_err(), "{bad}");
        }
    }
}
