//! Repeated measurements of one thing.

/// The values, in the order in which they came.
#[derive(Clone, Default)]
pub(super) struct Sample(Vec<f64>);

impl Sample {
    /// Adds a value.
    pub(super) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle value; the upper one of two. NaN when there is none.
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The smallest value.
    pub(super) fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The largest value.
    pub(super) fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// Median, and smallest to largest, as percents.
    pub(super) fn percent(&self) -> String {
        self.show(|value| format!("{:.1}", 100.0 * value)) + " %"
    }

    /// Median, and smallest to largest, in milliseconds of values in seconds.
    pub(super) fn milliseconds(&self) -> String {
        self.show(|value| format!("{:.1}", 1000.0 * value)) + " ms"
    }

    /// Median, and smallest to largest, with two decimals.
    pub(super) fn ratio(&self) -> String {
        self.show(|value| format!("{value:.2}"))
    }

    fn show(&self, one: impl Fn(f64) -> String) -> String {
        match self.0.len() {
            0 => "-".to_owned(),
            1 => one(self.median()),
            _ => format!(
                "{} ({}–{})",
                one(self.median()),
                one(self.min()),
                one(self.max())
            ),
        }
    }
}

impl FromIterator<f64> for Sample {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let sample: Sample = [3.0, 1.0, 2.0].into_iter().collect();
        assert_eq!(
            (sample.min(), sample.median(), sample.max()),
            (1.0, 2.0, 3.0)
        );
        assert_eq!(sample.ratio(), "2.00 (1.00–3.00)");
        assert!(Sample::default().median().is_nan());
        assert_eq!(Sample::default().percent(), "- %");
    }
}
