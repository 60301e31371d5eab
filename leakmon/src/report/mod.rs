//! Pure views of the model.
