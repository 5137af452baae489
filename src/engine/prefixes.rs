//! Beginnings of keys, in order. None begins with another, which it would have no part in: so one look finds the only one that a
//! key can begin with.

use std::collections::BTreeSet;
use std::ops::Bound::{Included, Unbounded};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Prefixes(BTreeSet<Box<str>>);

impl Prefixes {
    /// Adds one; it takes the place of those that begin with it.
    pub fn insert(&mut self, prefix: &str) {
        if self.begin(prefix) {
            return;
        }
        let longer: Vec<Box<str>> = self
            .0
            .range::<str, _>((Included(prefix), Unbounded))
            .take_while(|p| p.starts_with(prefix))
            .cloned()
            .collect();
        longer.iter().for_each(|longer| drop(self.0.take(longer)));
        self.0.insert(prefix.into());
    }

    /// Whether a key begins with one of them.
    #[must_use]
    pub fn begin(&self, key: &str) -> bool {
        self.0.range::<str, _>((Unbounded, Included(key))).next_back().is_some_and(|prefix| key.starts_with(&**prefix))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// In order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.iter().map(|prefix| &**prefix)
    }
}

impl<'a> FromIterator<&'a str> for Prefixes {
    fn from_iter<I: IntoIterator<Item = &'a str>>(prefixes: I) -> Self {
        let mut all = Self::default();
        prefixes.into_iter().for_each(|prefix| all.insert(prefix));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_key_begins_with_one_exactly_when_it_begins_with_any_that_was_added(
            added in prop::collection::vec("[ab]{0,4}", 0..8), keys in prop::collection::vec("[abc]{0,6}", 20),
        ) {
            let prefixes: Prefixes = added.iter().map(String::as_str).collect();
            for key in keys {
                prop_assert_eq!(prefixes.begin(&key), added.iter().any(|prefix| key.starts_with(prefix)), "{}", key);
            }
            let apart = |a: &str| prefixes.iter().filter(|b| b.starts_with(a)).count() == 1;
            prop_assert!(prefixes.iter().all(apart));
        }
    }
}
