//! What a log2 histogram says.

use std::time::Duration;

use super::{HISTOGRAM_BUCKETS, Histogram};

impl Histogram {
    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.buckets
            .iter()
            .fold(0, |sum, bucket| sum.saturating_add(*bucket))
    }

    /// Adds what `other` counted.
    pub fn add(&mut self, other: &Histogram) {
        for (bucket, more) in self.buckets.iter_mut().zip(other.buckets) {
            *bucket = bucket.saturating_add(more);
        }
        self.total_ns = self.total_ns.saturating_add(other.total_ns);
    }

    /// The duration that a share `q` (0 to 1) of all durations does not
    /// exceed; `None` when nothing was counted.
    ///
    /// An estimate: the bucket is exact, and inside it durations are taken to
    /// be spread evenly over the logarithm, so the answer is off by less than
    /// a factor of two. The last bucket has no upper bound.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = (q.clamp(0.0, 1.0) * count as f64).max(f64::MIN_POSITIVE);
        let mut below = 0.0;
        let mut last = 0;
        for (i, &bucket) in self.buckets.iter().enumerate() {
            if bucket == 0 {
                continue;
            }
            last = i;
            let here = bucket as f64;
            if below + here >= rank {
                let inside = ((rank - below) / here).clamp(0.0, 1.0);
                return Some(nanos((i as f64 + inside).exp2()));
            }
            below += here;
        }
        // Rounding of very large counts: the rank lies in the last bucket used.
        Some(nanos((last.min(HISTOGRAM_BUCKETS - 1) as f64 + 1.0).exp2()))
    }
}

fn nanos(ns: f64) -> Duration {
    Duration::from_nanos(ns as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use leakmon_common::histogram_bucket;

    fn of(durations: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for &ns in durations {
            histogram.buckets[histogram_bucket(ns)] += 1;
            histogram.total_ns += ns;
        }
        histogram
    }

    #[test]
    fn empty_has_no_quantile() {
        assert_eq!(of(&[]).quantile(0.5), None);
    }

    #[test]
    fn quantile_stays_in_its_bucket() {
        let histogram = of(&[50_000_000; 100]);
        for q in [0.0, 0.01, 0.5, 0.99, 1.0] {
            let ns = histogram.quantile(q).unwrap().as_nanos() as u64;
            assert!((1 << 25..=1 << 26).contains(&ns), "{q}: {ns}");
        }
        // Half way through a bucket is the square root of its width.
        let median = histogram.quantile(0.5).unwrap().as_secs_f64();
        assert!((median - 2f64.powf(25.5) / 1e9).abs() < 1e-6);
    }

    #[test]
    fn quantiles_pick_the_right_bucket() {
        let mut durations = vec![1_000; 98];
        durations.extend([1 << 30; 2]);
        let histogram = of(&durations);
        assert!(histogram.quantile(0.5).unwrap() < Duration::from_micros(2));
        assert!(histogram.quantile(0.99).unwrap() >= Duration::from_nanos(1 << 30));
    }

    #[test]
    fn counts_saturate() {
        let mut histogram = Histogram {
            buckets: [u64::MAX; HISTOGRAM_BUCKETS],
            total_ns: 0,
        };
        assert_eq!(histogram.count(), u64::MAX);
        assert!(histogram.quantile(1.0).is_some());
        let other = histogram.clone();
        histogram.add(&other);
        assert_eq!(histogram.buckets[3], u64::MAX);
    }
}
